"""Compiles a config's training step for a machine that is not attached, and says whether it fits.

It also says how fast a step can be at best.

  python -m moe_jax.dryrun --config=configs/glam.py:64b_64e --topology=v4:8x8x16
    --mesh=fsdp=4,expert=64,tensor=4

Nothing is allocated and nothing runs. The machine's compiler gets the shapes of the real model,
optimizer and batch. For TPUs this compiler is libtpu, which `pip install -e '.[dryrun]'` installs
and which needs no TPU. The times are estimates from the compiled program, not measurements.

  --topology=KIND:SHAPE   The machine. KIND is v2 v3 v4 v5e v5p v6e tpu7x, with the chips along each
                          dimension as SHAPE, or a100 h100 h200 b200, with hosts x GPUs per host.
  --mesh=AXIS=N,...       The devices along each mesh axis. Axes that are not named get 1. Without
                          --mesh, a config and a machine of docs/paper_scale.md get the mesh of that
                          page, and all others get their config.mesh.
  --slices=N              The number of slices, which are joined by the data centre's network along
                          the axis data.
  --fast                  Compiles in seconds instead of minutes. Memory comes out some 10% lower,
                          and cycles are not estimated.
  --search                Tries meshes, microbatches and recomputation, and ranks those that fit.
                          --search=N compiles N of them.
  --workdir=DIR           The folder for report.json and report.html, or for search.json. The
                          default is runs/dryrun/NAME.
  --config.KEY=VALUE      Changes the config, as for training.

Exit codes: 0 if it fits; 1 if it does not, and 2 if the command is wrong, each with one sentence
that says why.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

# This has to come before the imports below, because JAX then looks for accelerators.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from moe_jax.commands import Flag, guarded, parse, take_flags
from moe_jax.commands.allocator import spare_memory
from moe_jax.commands.flags import switch
from moe_jax.errors import ConfigError, whole

FLAGS = (
  Flag("topology"),
  Flag("mesh"),
  Flag("slices"),
  Flag("fast", bare=""),
  Flag("search", bare=""),
  Flag("workdir"),
)
COMPILES = 8  # candidates that --search compiles by default


def main(argv: Sequence[str]) -> int:
  """Runs the command and returns its exit code.

  Args:
    argv: The command line, beginning with the name of the program.
  """
  spare_memory()
  return guarded(argv, __doc__, _dry_run)


def _dry_run(argv: Sequence[str]) -> int:
  """Makes a plan or a search, prints and writes its results, and returns the exit code."""
  from moe_jax.dryrun import plan, search
  from moe_jax.dryrun.machine import meshes, topology
  from moe_jax.dryrun.page import document, text

  flags, rest = take_flags(argv[1:], FLAGS)
  command = parse([argv[0], *rest], workdir=False)
  machine = topology.parse(flags.get("topology"), whole("slices", flags.get("slices", "1")))
  fast = switch("fast", flags.get("fast"))
  workdir = pathlib.Path(flags.get("workdir") or default_workdir(command.path, machine))
  if "search" in flags:
    if "mesh" in flags:
      raise ConfigError(
        "mesh", flags["mesh"], "--search tries all meshes; leave one of the two out"
      )
    reports = search.search(
      command.config, command.path, machine, whole("search", flags["search"] or str(COMPILES))
    )
    print(search.table(reports), document.write_json(workdir / "search.json", reports), sep="\n")
    return 0 if any(report["fits"] for report in reports) else 1
  # A mesh on the command line, in either form, takes precedence over the one in the table.
  mesh_given = "mesh" in flags or any(arg.lstrip("-").startswith("config.mesh.") for arg in rest)
  table_mesh = None if mesh_given else meshes.find(command.path, machine)
  set_mesh(command.config, flags.get("mesh", table_mesh))
  report = plan.plan(command.config, command.path, machine, fast)
  print(text.text(report))
  if table_mesh:
    print(f"{'':>10}  The mesh is that of docs/paper_scale.md; --mesh sets another.")
  print(f"{'':>10}  {document.write(workdir, report)}")
  if report["fits"]:
    return 0
  print(f"error: {text.shortage(report)}; --search ranks what fits", file=sys.stderr, flush=True)
  return 1


def set_mesh(config: Any, mesh: str | None) -> None:
  """Writes the value of --mesh into the config.

  Args:
    config: The config to change.
    mesh: AXIS=N,... where axes that are not named get 1. None leaves the config as it is.

  Raises:
    ConfigError: If `mesh` does not have that form.
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
  """Returns the folder of a config and a machine, as in runs/dryrun/glam_64b_64e-v4_8x8x16."""
  name, _, variant = path.partition(":")
  words = [
    pathlib.PurePath(name).stem + (f"_{variant}" if variant else ""),
    str(machine).replace(" ", ""),
  ]
  return str(pathlib.Path("runs/dryrun") / "-".join(words).replace(":", "_"))


if __name__ == "__main__":
  sys.exit(main(sys.argv))
