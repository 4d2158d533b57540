"""Compiles one config for one machine and compares the compiler's figures with arithmetic."""

from __future__ import annotations

import resource
from typing import Any

from moe_jax import assembly, sharding
from moe_jax.dryrun import cache, compile, ideal
from moe_jax.dryrun.machine import interconnect, measured, roofline
from moe_jax.dryrun.machine.topology import Topology, make_devices
from moe_jax.dryrun.remedies import remedies
from moe_jax.hlo import program

LABEL = "compiler estimate, not measured"
# The chips whose clock in the compiler's estimates is known. Estimates of fast compiles are far too
# high, and so they are not used.
_CYCLES = ("v2", "v3", "v4", "v5e", "v5p")


def plan(
  config: Any, path: str, topology: Topology, fast: bool, devices: list | None = None
) -> dict[str, Any]:
  """Returns a report of what a config needs on a machine.

  Args:
    config: A config as in configs/base.py, including its mesh.
    path: The path of the config, for the report.
    topology: The machine.
    fast: Whether to optimise less, in seconds instead of minutes. Memory comes out about 10% lower,
      and the compiler's cycles are not reported.
    devices: The machine's devices if `make_devices` has already made them.

  Returns:
    A dictionary of values that JSON can represent, except that unknown figures are NaN. It always
    has the keys of `asked`, "label", "fits", and "memory" and "expected" in bytes on a device. If
    the program fits, it also has "flops", "roofline", "collectives", "exchange", "seconds" and
    "paper"; otherwise it has "remedies".

  Raises:
    ConfigError: If the config is wrong or does not suit the machine, or if the machine's compiler
      is not installed.
  """
  assembly.validate(config, topology.num_devices)
  mesh = compile.make_mesh(config, topology, devices or make_devices(topology))
  lowered = compile.lower(config, mesh)
  expected = ideal.memory(config, lowered.state, lowered.vocab_size, mesh)
  report = asked(config, path, topology, fast) | {"expected": expected, "label": LABEL}
  try:
    facts = compile.compile(lowered, topology, fast)
  except compile.DoesNotFit as error:
    suggestions = remedies(config, mesh, lowered.vocab_size, expected)
    return report | {
      "fits": False,
      "memory": {"available": error.has, "needs": error.needs},
      "remedies": suggestions,
    }
  memory = {
    name: facts[name] for name in ("peak", "arguments", "outputs", "aliased", "temporaries")
  }
  seconds = {
    "trace": lowered.seconds,
    "compile": facts["seconds"],
    "cached": facts["cached"],
    "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
  }
  return (
    report
    | {"fits": True, "memory": {"available": topology.chip.memory} | memory, "seconds": seconds}
    | _time(config, path, lowered, topology, facts["text"], fast)
  )


def asked(config: Any, path: str, topology: Topology, fast: bool) -> dict[str, Any]:
  """Returns the part of a report that states the question: config, machine, mesh and versions."""
  sizes = sharding.mesh_sizes(dict(config.mesh), topology.num_devices)
  # The compiler for GPUs has only one mode.
  mode = "fast" if fast and topology.chip.platform == "tpu" else "full"
  return {
    "config": path,
    "topology": str(topology),
    "chip": topology.chip.kind,
    "devices": topology.num_devices,
    "mesh": dict(zip(sharding.AXES, sizes, strict=True)),
    "mode": mode,
    "batch_size": config.train.batch_size,
    "accumulate_steps": config.train.accumulate_steps,
    "tokens": ideal.step_tokens(config),
    "steps": config.train.steps,
    "versions": cache.versions(),
  }


def _time(
  config: Any, path: str, lowered: compile.Lowered, topology: Topology, text: str, fast: bool
) -> dict[str, Any]:
  """Returns the part of a report that concerns the time of a program that fits.

  Args:
    config: The config.
    path: The path of the config, by which the paper's figure is found.
    lowered: The traced step.
    topology: The machine.
    text: The optimised HLO.
    fast: Whether the program was compiled in fast mode.
  """
  chip, mesh = topology.chip, lowered.mesh
  analysis = program.analyse(text, dict(mesh.shape))
  sent = roofline.moved(analysis.collectives, mesh, chip)
  flops = ideal.step_flops(config, lowered.vocab_size)
  bound = roofline.bound(
    analysis, sent, chip, mesh.size, ideal.step_tokens(config), flops, config.train.steps
  )
  if fast or chip.kind not in _CYCLES:
    bound = bound._replace(cycles=None)
  exchanged = sum(m.wire_bytes for m in sent if interconnect.ALL_TO_ALL in m.kind)
  paper = measured.find(path)
  return {
    "flops": {
      "program": analysis.flops,
      "ideal": flops / mesh.size,
      "unknown_loops": analysis.unknown_loops,
    },
    "roofline": bound._asdict(),
    "collectives": [m._asdict() for m in sent],
    "exchange": {"formula": ideal.exchange(config, dict(mesh.shape)), "program": exchanged},
    "paper": paper._asdict() if paper else None,
  }
