"""Everything that a training step reads and writes, and where it lives on the mesh."""

from __future__ import annotations

import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key, PyTree

from moe_jax import sharding
from moe_jax.training.optimizers import keys, stacked


@typing.no_type_check
@struct.dataclass
class TrainState:
  """What a run is at one moment, apart from its place in the data.

  Attributes:
    step: updates done so far.
    params: the model's weights, without Flax's metadata boxes.
    opt_state: the optimizer's moments.
    router_state: what balancing remembers ({} where it remembers nothing); changed by a rule, not
      by a gradient.
    rng: the run's key; step n draws from `fold_in(rng, n)`, so a resumed run draws what the first
      would have drawn.
  """

  step: Int[Array, ""]
  params: PyTree
  opt_state: PyTree
  router_state: PyTree
  rng: Key[Array, ""]


def init_variables(
  model: nn.Module, key: Key[Array, ""], seq_len: int, batch_size: int = 1
) -> PyTree:
  """The model's freshly drawn variables, in Flax's boxes that name each axis. Traceable."""
  tokens = jnp.zeros((batch_size, seq_len), jnp.int32)
  ones = jnp.ones_like(tokens)
  keys = {
    name: jax.random.fold_in(key, i) for i, name in enumerate(("params", "dropout", "router"))
  }
  return model.init(keys, tokens, ones, ones, train=False)


def init_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  key: Key[Array, ""],
  seq_len: int,
  batch_size: int = 1,
) -> TrainState:
  """The state before the first step. Pure: `jit`, `eval_shape` and `vmap` over keys all work.

  Args:
    model: a model of `models/`.
    optimizer: see `optimizers.py`.
    key: the run's seed; weights come from `fold_in(key, 0)`, the steps' randomness from
      `fold_in(key, 1)`.
    seq_len: of the dummy input; no weight's shape depends on it.
    batch_size: of the dummy input; must suit the mesh's data axes and the routing groups.
  """
  return first_state(
    init_variables(model, jax.random.fold_in(key, 0), seq_len, batch_size), optimizer, key
  )


def first_state(
  boxed: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
  """Returns the state before the first step, given what `init_variables` drew and the run's `key`.
  Pure."""
  variables = _unbox(boxed)
  params = variables["params"]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    router_state=variables.get("router_state", {}),
    rng=jax.random.fold_in(key, 1),
  )


def state_shardings(mesh: Mesh, boxed: PyTree, abstract: TrainState) -> TrainState:
  """A `NamedSharding` for every leaf of the state.

  Weights follow `sharding.RULES`; an optimizer's moment lies like the weight whose path ends its
  own path and whose shape it has, and one of Adafactor's factors like that weight without the
  dimension that it averages over. Everything else (counters) is replicated.

  Args:
    mesh: where the state will live.
    boxed: the abstract result of `init_variables`.
    abstract: the abstract result of `init_state`.
  """
  placed = sharding.param_shardings(mesh, boxed)
  replicated = NamedSharding(mesh, PartitionSpec())
  weights = {
    keys(path): (leaf.shape, place)
    for (path, leaf), place in zip(
      jax.tree_util.tree_leaves_with_path(abstract.params),
      jax.tree.leaves(placed["params"]),
      strict=True,
    )
  }

  def moment(path, leaf):
    names = keys(path)
    for start in range(len(names)):
      shape, place = weights.get(names[start:], (None, None))
      if shape == leaf.shape:
        return place
      if (
        shape
        and (lost := _averaged(names[start - 1], names[start:], shape, leaf.shape)) is not None
      ):
        return NamedSharding(
          mesh, PartitionSpec(*(axes for i, axes in enumerate(place.spec) if i != lost))
        )
    return replicated

  return TrainState(
    step=replicated,
    params=placed["params"],
    opt_state=jax.tree_util.tree_map_with_path(moment, abstract.opt_state),
    router_state=placed.get("router_state", {}),
    rng=replicated,
  )


def _averaged(
  slot: str, path: tuple[str, ...], weight: tuple[int, ...], factor: tuple[int, ...]
) -> int | None:
  """The dimension of the weight at `path` that optax's `v_row` (the longest one) or `v_col` (the
  next) has lost.

  Layers and experts do not count. None if it is no such factor.
  """
  place, alone = {"v_row": -1, "v_col": -2}.get(slot), stacked(path, len(weight))
  if place is None or len(weight) - alone < 2:
    return None
  lost = alone + int(np.argsort(weight[alone:])[place])
  return lost if weight[:lost] + weight[lost + 1 :] == factor else None


def create(
  mesh: Mesh,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  seed: int,
  seq_len: int,
  batch_size: int = 1,
) -> tuple[TrainState, Any]:
  """`(abstract, make)`: the state's shapes with their shardings, and a function that draws it onto
  the mesh."""

  def init(key):
    return init_state(model, optimizer, key, seq_len, batch_size)

  key = jax.random.key(seed)
  boxed = jax.eval_shape(lambda key: init_variables(model, key, seq_len, batch_size), key)
  shapes = jax.eval_shape(lambda boxed, key: first_state(boxed, optimizer, key), boxed, key)
  places = state_shardings(mesh, boxed, shapes)
  abstract = jax.tree.map(
    lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
  )
  # Drawing numbers once is not worth optimising: on a CPU that would take longer than compiling the
  # training step.
  options = {"xla_backend_optimization_level": 0} if sharding.platform(mesh) == "cpu" else {}
  return abstract, lambda: jax.jit(init, out_shardings=places, compiler_options=options)(key)


def _unbox(variables: PyTree) -> PyTree:
  # nn.unbox would also look for logical rules in a context; where weights live is decided in
  # `state_shardings`.
  def boxed(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)

  return jax.tree.map(lambda leaf: leaf.value if boxed(leaf) else leaf, variables, is_leaf=boxed)
