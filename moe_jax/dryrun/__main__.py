"""Compile a config's training step for a machine that is not here, and say whether it fits and how
fast it could be.

  python -m moe_jax.dryrun --config=configs/glam.py:64b_64e --topology=v4:8x8x16
    --mesh=fsdp=4,expert=64,tensor=4

Nothing is allocated, nothing runs: the compiler of the machine (libtpu, from pip install -e
'.[dryrun]'; no TPU is needed) gets the shapes of the real model, optimizer and batch. The times are
its estimates, not measurements.

  --topology=KIND:SHAPE   v2 v3 v4 v5e v5p v6e tpu7x with chips a dimension, or a100 h100 h200 b200
                          with hosts x GPUs
  --mesh=AXIS=N,...       devices a mesh axis; those not named get 1. Without --mesh a config and
                          machine of
                          docs/paper_scale.md get the mesh of that page, and others their
                            config.mesh
  --slices=N              that many slices, joined by the data centre's network along the axis data
  --fast                  seconds instead of minutes: memory comes out some 10% lower, cycles are
                          not estimated
  --search                tries meshes, microbatches and recomputation, and ranks those that fit;
                          --search=N compiles N
  --workdir=DIR           for report.json and report.html, or search.json; runs/dryrun/NAME if it is
                          not given
  --config.KEY=VALUE      as for training

Exit codes: 0 it fits; 1 it does not, told in one sentence; 2 the command is wrong, told in one
sentence.
"""

from __future__ import annotations

import ctypes
import difflib
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX looks for accelerators
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from moe_jax import train
from moe_jax.errors import ConfigError, whole

FLAGS = ("topology", "mesh", "slices", "fast", "search", "workdir")
COMPILES = 8  # of a search
ARENAS = 2  # heaps of the memory allocator
BLOCK = (
  1 << 16
)  # bytes, from which on a block is taken from the system, and given back to it when it is freed
_MALLOC = {
  -8: ARENAS,
  -3: BLOCK,
  -1: BLOCK,
}  # glibc's M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def run() -> None:
  """The console entry point."""
  sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""
  spare_memory()
  return train.guarded(argv, __doc__, _dry_run)


def spare_memory() -> None:
  """Has glibc give back what a compiler frees; call it before threads start. Does nothing with
  another C library.

  By itself glibc gives each thread a heap of its own, up to eight a core, and what one has freed
  the others cannot have; and with each large block that is freed it raises the size from which on
  blocks are given back.
  """
  try:
    for parameter, value in _MALLOC.items():
      ctypes.CDLL(None).mallopt(parameter, value)
  except (AttributeError, OSError, TypeError):
    pass


def _dry_run(argv: Sequence[str]) -> int:
  from moe_jax.dryrun import plan, search
  from moe_jax.dryrun.machine import meshes, topology
  from moe_jax.dryrun.page import document, text

  flags, rest = take_flags(argv)
  command = train.parse(rest, workdir=False)
  machine = topology.parse(flags.get("topology"), whole("slices", flags.get("slices", "1")))
  fast = _switch("fast", flags.get("fast"))
  workdir = pathlib.Path(flags.get("workdir") or default_workdir(command.path, machine))
  if "search" in flags:
    if "mesh" in flags:
      raise ConfigError(
        "mesh", flags["mesh"], "--search tries all meshes; leave one of the two out"
      )
    found = search.search(
      command.config, command.path, machine, whole("search", flags["search"] or str(COMPILES))
    )
    print(search.table(found), document.write_json(workdir / "search.json", found), sep="\n")
    return 0 if any(report["fits"] for report in found) else 1
  said = "mesh" in flags or any(arg.lstrip("-").startswith("config.mesh.") for arg in rest)
  shipped = None if said else meshes.find(command.path, machine)
  set_mesh(command.config, flags.get("mesh", shipped))
  report = plan.plan(command.config, command.path, machine, fast)
  print(text.text(report))
  if shipped:
    print(f"{'':>10}  The mesh is that of docs/paper_scale.md; --mesh says another.")
  print(f"{'':>10}  {document.write(workdir, report)}")
  if report["fits"]:
    return 0
  print(f"error: {text.shortage(report)}; --search ranks what fits", file=sys.stderr, flush=True)
  return 1


def take_flags(argv: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
  """`(this command's flags, all other arguments)`; a flag without = has None, or takes the next
  argument.

  Raises:
    ConfigError: there is no such flag.
  """
  flags, rest, i = {}, list(argv[:1]), 1
  while i < len(argv):
    name, equals, value = argv[i].partition("=")
    bare = name.lstrip("-")
    if name.startswith("-") and bare in FLAGS:
      if not equals and bare not in ("fast", "search"):
        i += 1
        value = argv[i] if i < len(argv) else ""
      flags[bare] = value
    elif name.startswith("-") and not bare.removeprefix("no").startswith("config"):
      near = difflib.get_close_matches(bare, [*FLAGS, "config"], 1)
      raise ConfigError(
        "flag",
        argv[i],
        (f"did you mean --{near[0]}? " if near else "") + "the flags are --config, "
        f"--config.KEY, {', '.join(f'--{flag}' for flag in FLAGS)}, --debug",
      )
    else:
      rest.append(argv[i])
    i += 1
  return flags, rest


def set_mesh(config: Any, mesh: str | None) -> None:
  """Writes --mesh=AXIS=N,... into the config; axes that it does not name get 1.

  Raises:
    ConfigError: it is not of that form.
  """
  if mesh is None:
    return
  from moe_jax import sharding

  sizes = {}
  for part in mesh.split(","):
    axis, equals, size = part.partition("=")
    if (
      not equals
      or axis not in sharding.AXES
      or not (size.removeprefix("-").isdecimal() and len(size) < 18)
    ):
      raise ConfigError(
        "mesh",
        mesh,
        f"must be AXIS=N,... with the axes {', '.join(sharding.AXES)}, as in data=4,expert=64",
      )
    sizes[axis] = int(size)
  config.mesh.update({axis: sizes.get(axis, 1) for axis in sharding.AXES})


def default_workdir(path: str, machine: Any) -> str:
  """runs/dryrun/glam_64b_64e-v4_8x8x16."""
  name, _, variant = path.partition(":")
  words = [
    pathlib.PurePath(name).stem + (f"_{variant}" if variant else ""),
    str(machine).replace(" ", ""),
  ]
  return str(pathlib.Path("runs/dryrun") / "-".join(words).replace(":", "_"))


def _switch(flag: str, value: str | None) -> bool:
  if value not in (None, "", "true", "false"):
    raise ConfigError(flag, value, "takes no value")
  return value in ("", "true")


if __name__ == "__main__":
  run()
