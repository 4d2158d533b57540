"""The real training step, compiled from shapes alone for a machine that is not there. Nothing is
allocated."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import assembly, data, sharding
from moe_jax.dryrun import cache
from moe_jax.dryrun.machine.chips import GIB
from moe_jax.dryrun.machine.topology import Topology
from moe_jax.errors import ConfigError
from moe_jax.run import update as updates
from moe_jax.training import optimizers
from moe_jax.training import state as states

FAST = {"exec_time_optimization_effort": -1.0}  # of the TPU compiler: seconds instead of minutes
INPUTS = ("inputs", "targets", "segment_ids", "positions")
ENCODER_INPUTS = tuple(f"encoder_{name}" for name in ("tokens", "segment_ids", "positions"))


class DoesNotFit(Exception):
  """The program needs more memory than a device has: `needs` and `has`, in bytes (`needs`: at
  least)."""

  def __init__(self, needs: float, has: float):
    self.needs, self.has = needs, has
    super().__init__(f"needs {needs / GIB:.2f} GiB a device and there are {has / GIB:.2f}")


class Lowered(NamedTuple):
  """A training step traced for a mesh.

  Attributes:
    stage: of `jax.jit(...).lower`.
    mesh: over the machine's devices.
    model: whose step it is.
    state: abstract, each leaf with its sharding.
    vocab_size: ids of the data.
    seconds: that tracing took.
  """

  stage: Any
  mesh: jax.sharding.Mesh
  model: nn.Module
  state: states.TrainState
  vocab_size: int
  seconds: float


def vocabulary(config) -> int:
  """The number of ids: the config's, or else the tokenizer's, which must then be there."""
  return assembly.fixed_vocab_size(config) or data.vocab_size(
    config.data, data.tokenizer_of(config.data)
  )


def make_model(config, vocab_size: int, mesh: jax.sharding.Mesh) -> nn.Module:
  """The model; where the config fixes the sizes of its vocabularies, nobody asks how many ids the
  data hold."""
  return assembly.model(config, 1 if assembly.fixed_vocab_size(config) else vocab_size, mesh)


def make_mesh(config, topology: Topology, devices: Sequence) -> jax.sharding.Mesh:
  """The mesh of a config over a machine, as `sharding.make_mesh` lays it on the real one.

  Raises:
    ConfigError: the mesh does not fit the devices.
  """
  shape = sharding.mesh_sizes(dict(config.mesh), topology.num_devices)
  if math.prod(shape) != topology.num_devices:
    raise ConfigError(
      "mesh",
      dict(config.mesh),
      f"uses {math.prod(shape)} of the {topology.num_devices} devices of {topology}; use them all",
    )
  return sharding.make_mesh(dict(config.mesh), devices)


def abstract_batch(config, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """A global batch's shapes, laid out as the loop puts batches on the mesh."""
  rows, place = config.train.batch_size, sharding.batch_sharding(mesh)
  lengths = dict.fromkeys(INPUTS, config.data.seq_len)
  if config.data.objective == "span_corruption":
    lengths |= dict.fromkeys(ENCODER_INPUTS, config.data.encoder_len)
  return {
    name: jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place)
    for name, length in lengths.items()
  }


def lower(config, mesh: jax.sharding.Mesh) -> Lowered:
  """Traces the step that the loop would run on this mesh; implementations are chosen by the mesh's
  devices."""
  start, vocab_size = time.monotonic(), vocabulary(config)
  model = make_model(config, vocab_size, mesh)
  optimizer, schedule = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), config.train.steps
  )
  rows = config.train.batch_size // config.train.accumulate_steps
  with sharding.use_rules(dict(config.sharding)):
    state, _ = states.create(mesh, model, optimizer, config.seed, config.data.seq_len, rows)
    with jax.set_mesh(mesh):
      stage = updates.make(config, model, optimizer, schedule).lower(
        state, abstract_batch(config, mesh)
      )
  return Lowered(stage, mesh, model, state, vocab_size, time.monotonic() - start)


def compile(lowered: Lowered, topology: Topology, fast: bool) -> dict[str, Any]:
  """What the compiler makes of a step, from the cache where it was asked before.

  Returns:
    {"text": HLO, "seconds": that compiling took, "peak", "arguments", "outputs", "aliased",
      "temporaries": bytes a
    device, "cached": whether they were known}.

  Raises:
    DoesNotFit: the compiler says so; or, for GPUs, whose compiler does not, the peak is above the
      memory.
  """
  options = FAST if fast and topology.chip.platform == "tpu" else {}
  machine = f"{topology} {[device.id for device in lowered.mesh.devices.flat]}"
  facts, known = cache.remembered(
    lowered.stage.as_text(),
    machine,
    sorted(options.items()),
    lambda: _compile(lowered, topology, options),
  )
  if "needs" in facts:
    raise DoesNotFit(facts["needs"], facts["has"])
  if topology.chip.platform == "cuda" and facts["peak"] > topology.chip.memory:
    raise DoesNotFit(facts["peak"], topology.chip.memory)
  return facts | {"cached": known}


def _compile(lowered: Lowered, topology: Topology, options: dict[str, Any]) -> dict[str, Any]:
  start = time.monotonic()
  try:
    with _without_cache():
      done = lowered.stage.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    return _shortage(error, topology) | {"seconds": time.monotonic() - start}
  m = done.memory_analysis()
  facts = {
    "seconds": time.monotonic() - start,
    "arguments": m.argument_size_in_bytes,
    "outputs": m.output_size_in_bytes,
    "aliased": m.alias_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
  }
  # On TPUs live buffers take the place of dead ones, which arguments + temporaries would count
  # twice.
  both = m.argument_size_in_bytes + m.temp_size_in_bytes
  return facts | {
    "peak": m.peak_memory_in_bytes if topology.chip.platform == "tpu" else both,
    "text": done.as_text(),
  }


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _shortage(error: Exception, topology: Topology) -> dict[str, float]:
  """The two sizes of an out-of-memory message, what is needed and what there is; any other error is
  raised again."""
  if "RESOURCE_EXHAUSTED" not in str(error):
    raise error
  found = re.findall(r"(\d+(?:\.\d+)?)([KMGT])(?:i?B)?\b", str(error))
  sizes = [float(number) * _UNITS[unit] for number, unit in found]
  needs, has = sizes[:2] if len(sizes) > 1 else (math.nan, topology.chip.memory)
  return {"needs": needs, "has": has}


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
  """JAX's own cache writes programs for absent machines and then cannot read them."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
