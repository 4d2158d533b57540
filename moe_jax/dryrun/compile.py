"""Compiles the real training step for a machine that is not attached.

The compiler gets shapes only, and nothing is allocated.
"""

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

from moe_jax import assembly, sharding
from moe_jax.dryrun import cache
from moe_jax.dryrun.machine.chips import GIB
from moe_jax.dryrun.machine.topology import Topology
from moe_jax.errors import ConfigError
from moe_jax.run import update as updates
from moe_jax.training import optimizers
from moe_jax.training import state as states
from moe_jax.training.options import TrainOptions

# Options with which the TPU compiler takes seconds instead of minutes. The first one replaced the
# second, which newer compilers refuse.
FAST: dict[str, Any] = (
  {"optimization_level": "O1"}
  if jax.__version_info__ >= (0, 11, 0)
  else {"exec_time_optimization_effort": -1.0}
)
INPUTS = ("inputs", "targets", "segment_ids", "positions")
ENCODER_INPUTS = tuple(f"encoder_{name}" for name in ("tokens", "segment_ids", "positions"))


class DoesNotFit(Exception):
  """The program needs more memory than a device has.

  Attributes:
    needs: The bytes that it needs at least, or NaN if the compiler does not say.
    has: The bytes that a device has.
  """

  def __init__(self, needs: float, has: float):
    self.needs, self.has = needs, has
    super().__init__(f"needs {needs / GIB:.2f} GiB a device and there are {has / GIB:.2f}")


class Lowered(NamedTuple):
  """A training step traced for a mesh.

  Attributes:
    stage: The result of `jax.jit(...).lower`.
    mesh: The mesh over the machine's devices.
    model: The model that is trained.
    state: The abstract training state, whose leaves have shardings.
    vocab_size: The number of ids in the data.
    seconds: The time that tracing took.
  """

  stage: Any
  mesh: jax.sharding.Mesh
  model: nn.Module
  state: states.TrainState
  vocab_size: int
  seconds: float


def make_model(config, vocab_size: int, mesh: jax.sharding.Mesh) -> nn.Module:
  """Returns the model of a config.

  Args:
    config: The config.
    vocab_size: The number of ids in the data. It is ignored if the config fixes the vocabulary.
    mesh: The mesh that the model is for.
  """
  return assembly.model(config, 1 if assembly.fixed_vocab_size(config) else vocab_size, mesh)


def make_mesh(config, topology: Topology, devices: Sequence) -> jax.sharding.Mesh:
  """Returns the mesh of a config over a machine, laid out as on the real machine.

  Args:
    config: The config, whose `mesh` has the sizes.
    topology: The machine.
    devices: The machine's devices, as `topology.make_devices` returns them.

  Raises:
    ConfigError: If the mesh does not use all devices of the machine, or does not fit them.
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
  """Returns the shapes of a global batch, with the sharding that the training loop gives to it."""
  rows, place = config.train.batch_size, sharding.batch_sharding(mesh)
  lengths = dict.fromkeys(INPUTS, config.data.seq_len)
  if config.data.objective == "span_corruption":
    lengths |= dict.fromkeys(ENCODER_INPUTS, config.data.encoder_len)
  return {
    name: jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place)
    for name, length in lengths.items()
  }


def lower(config, mesh: jax.sharding.Mesh) -> Lowered:
  """Traces the step that the training loop would run on this mesh.

  Where there is a choice of implementations, the platform of the mesh's devices decides.
  """
  start, vocab_size = time.monotonic(), assembly.vocab_size(config)
  model = make_model(config, vocab_size, mesh)
  optimizer, schedule = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), config.train.steps
  )
  rows = TrainOptions.of(config.train).microbatch
  with sharding.use_rules(dict(config.sharding)):
    state, _ = states.create(mesh, model, optimizer, config.seed, config.data.seq_len, rows)
    with jax.set_mesh(mesh):
      stage = updates.make(config, model, optimizer, schedule).lower(
        state, abstract_batch(config, mesh)
      )
  return Lowered(stage, mesh, model, state, vocab_size, time.monotonic() - start)


def compile(lowered: Lowered, topology: Topology, fast: bool) -> dict[str, Any]:
  """Compiles a step, or returns the cached result of an earlier compilation.

  Args:
    lowered: The traced step.
    topology: The machine.
    fast: Whether to optimise less. It has no effect for GPUs.

  Returns:
    A dictionary with these keys:
    "text": the optimised HLO;
    "seconds": the time that compiling took;
    "peak", "arguments", "outputs", "aliased", "temporaries": bytes on one device;
    "cached": whether the result came from the cache.

  Raises:
    DoesNotFit: If the compiler reports that memory does not suffice. The compiler for GPUs does not
      report this, so for GPUs it is raised if the peak exceeds the memory.
  """
  options = FAST if fast and topology.chip.platform == "tpu" else {}
  machine = f"{topology} {[device.id for device in lowered.mesh.devices.flat]}"
  facts, cached = cache.remembered(
    lowered.stage.as_text(),
    machine,
    sorted(options.items()),
    lambda: _compile(lowered, topology, options),
  )
  if "needs" in facts:
    raise DoesNotFit(facts["needs"], facts["has"])
  if topology.chip.platform == "cuda" and facts["peak"] > topology.chip.memory:
    raise DoesNotFit(facts["peak"], topology.chip.memory)
  return facts | {"cached": cached}


def _compile(lowered: Lowered, topology: Topology, options: dict[str, Any]) -> dict[str, Any]:
  """Compiles without a cache; returns the facts of `compile`, or "needs", "has" and "seconds"."""
  start = time.monotonic()
  try:
    with _without_cache():
      compiled = lowered.stage.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    return _shortage(error, topology) | {"seconds": time.monotonic() - start}
  m = compiled.memory_analysis()
  facts = {
    "seconds": time.monotonic() - start,
    "arguments": m.argument_size_in_bytes,
    "outputs": m.output_size_in_bytes,
    "aliased": m.alias_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
  }
  # On TPUs live buffers take the place of dead ones, so that arguments + temporaries would count
  # some memory twice.
  total = m.argument_size_in_bytes + m.temp_size_in_bytes
  return facts | {
    "peak": m.peak_memory_in_bytes if topology.chip.platform == "tpu" else total,
    "text": compiled.as_text(),
  }


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _shortage(error: Exception, topology: Topology) -> dict[str, float]:
  """Reads the needed and the available bytes from an out-of-memory error.

  Args:
    error: What the compiler raised. If it is not an out-of-memory error, it is raised again.
    topology: The machine, whose memory is used if the message has no sizes.

  Returns:
    {"needs": bytes, or NaN if the message has no sizes; "has": bytes}.
  """
  if "RESOURCE_EXHAUSTED" not in str(error):
    raise error
  # The message names what is needed first, and then what is available.
  matches = re.findall(r"(\d+(?:\.\d+)?)([KMGT])(?:i?B)?\b", str(error))
  sizes = [float(number) * _UNITS[unit] for number, unit in matches]
  needs, has = sizes[:2] if len(sizes) > 1 else (math.nan, topology.chip.memory)
  return {"needs": needs, "has": has}


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
  """Turns JAX's compilation cache off for a while.

  JAX would write programs for absent machines into it, but could not read them.
  """
  # JAX defines the attributes of its options at run time, where type checkers do not see them.
  before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
