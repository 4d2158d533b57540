"""Which mesh, how many microbatches and how much recomputation: tried on a machine that is not
here."""

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

REMAT = {
  "none": 3.0,
  "dots": 3.2,
  "full": 4.0,
}  # of model.remat -> forward passes' worth of matmuls a step, roughly
SLACK = 1.5  # compilers need up to this many times what arithmetic counts
MICROBATCHES = (1, 2, 4, 8, 16)


class Candidate(NamedTuple):
  """A way to run a config.

  Attributes:
    changes: dotted key -> value, of the mesh, train.accumulate_steps and model.remat.
    words: what these are.
    memory: bytes a device by arithmetic, at least.
    seconds: a step, by a rough formula: what comes first is compiled first.
  """

  changes: dict[str, Any]
  words: str
  memory: float
  seconds: float


def search(config: Any, path: str, topology: Topology, limit: int) -> list[dict[str, Any]]:
  """Reports (see `plan.plan`, and "words") of at most `limit` candidates, compiled fast; the
  fastest that fits first.

  Candidates that cannot fit by arithmetic are not compiled, nor those that rank low by a rough
  formula of their time.

  Raises:
    ConfigError: nothing can fit.
  """
  import tqdm

  devices = make_devices(topology)
  counted = tqdm.tqdm(candidates(config, topology, devices), unit=" by arithmetic", leave=False)
  found = [c for c in counted if c.memory < topology.chip.memory]
  if not found:
    raise ConfigError(
      "topology",
      str(topology),
      "no mesh, microbatch and recomputation makes weights, gradients and "
      "the optimizer's state fit; use a larger slice or chips with more memory",
    )
  tight = topology.chip.memory / SLACK
  found.sort(key=lambda c: (c.memory > tight, c.seconds, c.changes["train.accumulate_steps"]))
  reports = []
  for candidate in tqdm.tqdm(
    _spread(found)[:limit], unit=" compiled", desc=f"{len(found)} may fit"
  ):
    try:
      report = plan.plan(changed(config, candidate.changes), path, topology, True, devices)
    except ConfigError:  # the arithmetic knows less than the model, for instance of groups
      continue
    reports.append(report | {"words": candidate.words})
  return sorted(
    reports,
    key=lambda r: (not r["fits"], r["roofline"]["seconds"] if r["fits"] else r["memory"]["needs"]),
  )


def _spread(found: Sequence[Candidate]) -> list[Candidate]:
  """Of each mesh the first first, then of each the second, ...: near twins are not all that is
  compiled."""
  seen: dict[str, int] = {}
  keyed = []
  for i, candidate in enumerate(found):
    mesh = str([value for key, value in candidate.changes.items() if key.startswith("mesh.")])
    seen[mesh] = seen.get(mesh, -1) + 1
    keyed.append((seen[mesh], i, candidate))
  return [candidate for _, _, candidate in sorted(keyed, key=lambda k: k[:2])]


def candidates(config: Any, topology: Topology, devices: Sequence) -> Iterator[Candidate]:
  """Every mesh of powers of two that suits the model, with every number of microbatches and every
  recomputation.

  Their rough time is that of matmuls, exchanges, weights, and the sums of tensor parallelism, which
  count as eight times what recomputation starts from, one after the other over four links.
  """
  vocab_size = compile.vocabulary(config)

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
    fitting, _kept(config, fitting, devices, vocab_size), strict=True
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
  try:
    assembly.validate(
      changed(config, _mesh_keys(sizes) | {"train.accumulate_steps": 1}), topology.num_devices
    )
  except ConfigError:
    return False
  return True


def _kept(
  config: Any, fitting: Sequence[dict[str, int]], devices: Sequence, vocab_size: int
) -> Iterator[tuple]:
  """For each mesh: bytes a device of the weights; and of weights, gradients and the optimizer's
  state together."""
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
    yield weights, 2 * weights + ideal.held(state.opt_state)


def weights_sent(weights: float, sizes: dict[str, int], steps: int) -> float:
  """Bytes that a device sends of its weights and their gradients in a step, roughly.

  They are gathered twice and reduced once over fsdp for each microbatch, and summed once over data.
  What a first pass over the microbatches (`training.accumulate`) would gather does not count.
  """
  return weights * (3 * steps * (sizes["fsdp"] - 1) + 2 * (sizes["data"] > 1))


def meshes(num_devices: int, slices: int = 1) -> Iterator[dict[str, int]]:
  """All meshes of powers of two, times what is odd along `data`, whose product is the number of
  devices."""
  even = num_devices & -num_devices
  powers = [2**i for i in range(even.bit_length())]
  for rest in itertools.product(powers, repeat=len(sharding.AXES) - 1):
    if even % math.prod(rest) == 0 and num_devices // math.prod(rest) % slices == 0:
      yield dict(zip(sharding.AXES, (num_devices // math.prod(rest), *rest), strict=True))


def table(reports: Sequence[dict[str, Any]]) -> str:
  """The ranking, a line a candidate."""
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
