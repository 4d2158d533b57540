"""One config on one machine: compile it and put the compiler's figures beside what arithmetic
expects."""

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
_CYCLES = (
  "v2",
  "v3",
  "v4",
  "v5e",
  "v5p",
)  # where the compiler's clock is known; its fast mode is far too slow


def plan(
  config: Any, path: str, topology: Topology, fast: bool, devices: list | None = None
) -> dict[str, Any]:
  """What `config` needs on `topology`, as JSON would hold it; NaN where a figure is not known.

  Args:
    config: as of configs/base.py; its mesh counts.
    path: where it came from.
    topology: the machine.
    fast: less optimisation, in seconds instead of minutes: memory 10% lower or so, no estimate of
      time.
    devices: of `make_devices`, where they are there already.

  Returns:
    What is asked (config, topology, mesh, mode, ...), "fits", "memory" and "expected" in bytes a
      device; where it fits
    also "flops", "roofline", "collectives", "exchange", "seconds" and "paper", where not
      "remedies".

  Raises:
    ConfigError: the config is wrong, or does not suit the machine; or its compiler is not
      installed.
  """
  assembly.validate(config, topology.num_devices)
  mesh = compile.make_mesh(config, topology, devices or make_devices(topology))
  lowered = compile.lower(config, mesh)
  expected = ideal.memory(config, lowered.state, lowered.vocab_size, mesh)
  report = asked(config, path, topology, fast) | {"expected": expected, "label": LABEL}
  try:
    facts = compile.compile(lowered, topology, fast)
  except compile.DoesNotFit as error:
    found = remedies(config, mesh, lowered.vocab_size, expected)
    return report | {
      "fits": False,
      "memory": {"available": error.has, "needs": error.needs},
      "remedies": found,
    }
  memory = {
    name: facts[name] for name in ("peak", "arguments", "outputs", "aliased", "temporaries")
  }
  took = {
    "trace": lowered.seconds,
    "compile": facts["seconds"],
    "cached": facts["cached"],
    "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
  }
  return (
    report
    | {"fits": True, "memory": {"available": topology.chip.memory} | memory, "seconds": took}
    | _time(config, path, lowered, topology, facts["text"], fast)
  )


def asked(config: Any, path: str, topology: Topology, fast: bool) -> dict[str, Any]:
  """The question."""
  sizes = sharding.mesh_sizes(dict(config.mesh), topology.num_devices)
  mode = (
    "fast" if fast and topology.chip.platform == "tpu" else "full"
  )  # GPUs' compiler has one only
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
  """What can be said of the time of a program that fits."""
  chip, mesh = topology.chip, lowered.mesh
  found = program.analyse(text, dict(mesh.shape))
  sent = roofline.moved(found.collectives, mesh, chip)
  flops = ideal.step_flops(config, lowered.vocab_size)
  bound = roofline.bound(
    found, sent, chip, mesh.size, ideal.step_tokens(config), flops, config.train.steps
  )
  if fast or chip.kind not in _CYCLES:
    bound = bound._replace(cycles=None)
  exchanged = sum(m.wire_bytes for m in sent if interconnect.ALL_TO_ALL in m.kind)
  paper = measured.find(path)
  return {
    "flops": {
      "program": found.flops,
      "ideal": flops / mesh.size,
      "unknown_loops": found.unknown_loops,
    },
    "roofline": bound._asdict(),
    "collectives": [m._asdict() for m in sent],
    "exchange": {"formula": ideal.exchange(config, dict(mesh.shape)), "program": exchanged},
    "paper": paper._asdict() if paper else None,
  }
