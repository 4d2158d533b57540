"""Searches for the mesh, the number of microbatches and the recomputation that run fastest.

The candidates are compiled for a machine that is not attached.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import accounts, assembly, sharding
from moe_jax.dryrun import compile, ideal, plan
from moe_jax.dryrun.machine.chips import GIB
from moe_jax.dryrun.machine.topology import Topology, make_devices
from moe_jax.dryrun.page import text
from moe_jax.dryrun.remedies import changed
from moe_jax.errors import ConfigError
from moe_jax.training import optimizers
from moe_jax.training import state as states

# The value of model.remat -> the matmuls of a step, in forward passes, roughly.
REMAT = {"none": 3.0, "dots": 3.2, "full": 4.0}
SLACK = 1.5  # compiled programs need up to this many times the memory that arithmetic counts
MICROBATCHES = (1, 2, 4, 8, 16)


class Candidate(NamedTuple):
  """A way to run a config.

  Attributes:
    changes: Dotted config key to value, for the mesh, train.accumulate_steps and model.remat.
    words: A description of the changes, for display.
    memory: The bytes on a device by arithmetic. The compiled program needs at least as much.
    seconds: The time of a step by a rough formula, which decides what is compiled first.
  """

  changes: dict[str, Any]
  words: str
  memory: float
  seconds: float


def search(config: Any, path: str, topology: Topology, limit: int) -> list[dict[str, Any]]:
  """Compiles the most promising candidates in fast mode and returns their reports.

  Candidates that cannot fit by arithmetic are not compiled. Nor are those that a rough formula of
  their time ranks low.

  Args:
    config: The config, whose mesh, number of microbatches and recomputation are replaced.
    path: The path of the config, for the reports.
    topology: The machine.
    limit: The largest number of candidates to compile.

  Returns:
    Reports as of `plan.plan`, each with "words", which describes the candidate. Those that fit come
    first, the fastest at the top. Those that do not fit follow by the memory that they need.

  Raises:
    ConfigError: If no candidate can fit.
  """
  import tqdm

  devices = make_devices(topology)
  counted = tqdm.tqdm(candidates(config, topology, devices), unit=" by arithmetic", leave=False)
  possible = [c for c in counted if c.memory < topology.chip.memory]
  if not possible:
    raise ConfigError(
      "topology",
      str(topology),
      "no mesh, microbatch and recomputation makes weights, gradients and "
      "the optimizer's state fit; use a larger slice or chips with more memory",
    )
  # Candidates that may not fit after compilation come last.
  tight = topology.chip.memory / SLACK
  possible.sort(key=lambda c: (c.memory > tight, c.seconds, c.changes["train.accumulate_steps"]))
  reports = []
  for candidate in tqdm.tqdm(
    _spread(possible)[:limit], unit=" compiled", desc=f"{len(possible)} may fit"
  ):
    try:
      report = plan.plan(changed(config, candidate.changes), path, topology, True, devices)
    except ConfigError:
      # Some conditions, for instance on groups of tokens, are known only to the model.
      continue
    reports.append(report | {"words": candidate.words})
  return sorted(
    reports,
    key=lambda r: (not r["fits"], r["roofline"]["seconds"] if r["fits"] else r["memory"]["needs"]),
  )


def _spread(ranked: Sequence[Candidate]) -> list[Candidate]:
  """Orders candidates by their rank among those of the same mesh, the best of each mesh first.

  Otherwise all candidates that are compiled could have nearly the same mesh.
  """
  place_in_mesh: dict[str, int] = {}
  keyed = []
  for i, candidate in enumerate(ranked):
    mesh = str([value for key, value in candidate.changes.items() if key.startswith("mesh.")])
    place_in_mesh[mesh] = place_in_mesh.get(mesh, -1) + 1
    keyed.append((place_in_mesh[mesh], i, candidate))
  return [candidate for _, _, candidate in sorted(keyed, key=lambda k: k[:2])]


def candidates(config: Any, topology: Topology, devices: Sequence) -> Iterator[Candidate]:
  """Yields each mesh that suits the model, with each number of microbatches and recomputation.

  The meshes are those of `meshes`. The rough time of a candidate is the sum of the times of its
  matmuls and of what it sends over four links: the exchange with experts, the weights, and the sums
  of tensor parallelism. The last count as eight times the activations that full recomputation
  saves.

  Args:
    config: The config.
    topology: The machine.
    devices: The machine's devices.
  """
  vocab_size = assembly.vocab_size(config)

  with_remat = functools.cache(lambda remat: changed(config, {"model.remat": remat}))
  saved = functools.cache(
    lambda remat, tensor: accounts.activation_bytes(with_remat(remat), vocab_size, tensor)
  )
  exchanged = functools.cache(lambda remat: accounts.exchange_bytes(with_remat(remat)))
  flops = ideal.step_flops(config, vocab_size)
  fitting = [
    sizes
    for sizes in meshes(topology.num_devices, topology.slices)
    if _suits(config, sizes, topology)
  ]
  for sizes, (weights, kept) in zip(
    fitting, _state_bytes(config, fitting, devices, vocab_size), strict=True
  ):
    shards, tensor = ideal.batch_shards(sizes), sizes["tensor"]
    for steps, remat in itertools.product(MICROBATCHES, REMAT):
      if config.train.batch_size % (steps * shards):
        continue
      rows = config.train.batch_size / shards
      sent = rows * (
        8 * saved("full", tensor) * (tensor > 1) + exchanged(remat) * (sizes["expert"] > 1)
      )
      changes = _mesh_keys(sizes) | {"train.accumulate_steps": steps, "model.remat": remat}
      yield Candidate(
        changes,
        f"{text.mesh_words(sizes)}, {steps} microbatches, remat={remat}",
        kept + rows / steps * saved(remat, tensor) / tensor,
        flops * REMAT[remat] / 3 / topology.num_devices / topology.chip.flops
        + (sent + weights_sent(weights, sizes, steps)) / (4 * topology.chip.link),
      )


def _mesh_keys(sizes: dict[str, int]) -> dict[str, int]:
  return {f"mesh.{axis}": size for axis, size in sizes.items()}


def _suits(config: Any, sizes: dict[str, int], topology: Topology) -> bool:
  """Returns whether the config is valid with a mesh of these sizes and one microbatch."""
  try:
    assembly.validate(
      changed(config, _mesh_keys(sizes) | {"train.accumulate_steps": 1}), topology.num_devices
    )
  except ConfigError:
    return False
  return True


def _state_bytes(
  config: Any, fitting: Sequence[dict[str, int]], devices: Sequence, vocab_size: int
) -> Iterator[tuple]:
  """Yields, for each mesh, bytes on one device: (weights, weights + gradients + optimizer state).

  Args:
    config: The config.
    fitting: Axis name to size, for each mesh.
    devices: The machine's devices.
    vocab_size: The number of ids in the data.
  """
  # The shapes are the same for all meshes, so they are traced once, on a mesh of one device.
  one = jax.sharding.Mesh(np.array(devices[:1]).reshape((1,) * len(sharding.AXES)), sharding.AXES)
  model, (optimizer, _) = (
    compile.make_model(config, vocab_size, one),
    optimizers.make(optimizers.OptimizerOptions.of(config.optimizer), 1),
  )
  length, rows, key = config.data.seq_len, config.train.batch_size, jax.random.key(0)
  boxed = jax.eval_shape(lambda k: states.init_variables(model, k, length, rows), key)
  shapes = jax.eval_shape(lambda boxed, k: states.first_state(boxed, optimizer, k), boxed, key)
  for sizes in fitting:
    mesh = jax.sharding.Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes))

    def placed(x, place):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    with sharding.use_rules(dict(config.sharding)):
      state = jax.tree.map(placed, shapes, states.state_shardings(mesh, boxed, shapes))
    weights = ideal.held(state.params)
    # Gradients are as large as the weights.
    yield weights, 2 * weights + ideal.held(state.opt_state)


def weights_sent(weights: float, sizes: dict[str, int], steps: int) -> float:
  """Returns roughly how many bytes of weights and gradients a device sends in a step.

  Over fsdp, weights are gathered twice and gradients are reduced once for each microbatch. Over
  data, gradients are summed once. The first pass over the microbatches, which
  `training.accumulate` makes for some configs, is not counted.

  Args:
    weights: The bytes of the weights on one device.
    sizes: Mesh axis name to size.
    steps: The number of microbatches.
  """
  return weights * (3 * steps * (sizes["fsdp"] - 1) + 2 * (sizes["data"] > 1))


def meshes(num_devices: int, slices: int = 1) -> Iterator[dict[str, int]]:
  """Yields all meshes over that many devices, as axis name to size.

  All sizes are powers of two, except that an odd factor of the number of devices goes to `data`.

  Args:
    num_devices: The number of devices in all slices.
    slices: The number of slices, of which the size of `data` is a multiple.
  """
  even = num_devices & -num_devices  # the largest power of two that divides num_devices
  powers = [2**i for i in range(even.bit_length())]
  for rest in itertools.product(powers, repeat=len(sharding.AXES) - 1):
    if even % math.prod(rest) == 0 and num_devices // math.prod(rest) % slices == 0:
      yield dict(zip(sharding.AXES, (num_devices // math.prod(rest), *rest), strict=True))


def table(reports: Sequence[dict[str, Any]]) -> str:
  """Returns the ranking as text, with one line for each report."""
  lines = [f"{'seconds':>9}{'MFU':>6}{'GiB':>8}  at best; {plan.LABEL}"]
  for report in reports:
    if report["fits"]:
      r = report["roofline"]
      lines.append(
        f"{text.number(r['seconds']):>9}{r['mfu']:>6.0%}{report['memory']['peak'] / GIB:>8.2f}  "
        f"{report['words']}; {r['binds']} binds"
      )
    else:
      lines.append(
        f"{'-':>9}{'':>6}{report['memory']['needs'] / GIB:>8.2f}  {report['words']}; does not fit"
      )
  return "\n".join(lines)
