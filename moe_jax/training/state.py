"""The state that a training step reads and writes, and its shardings on the mesh."""

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
from moe_jax.training.weight_paths import keys, stacked


@typing.no_type_check
class TrainState(struct.PyTreeNode):
  """The state of a run between two steps, apart from its position in the data.

  Attributes:
    step: The number of updates done so far.
    params: The model's weights, without Flax's metadata boxes.
    opt_state: The optimizer's moments.
    router_state: The state of load balancing, which a rule updates instead of a gradient. It is {}
      if balancing has no state.
    rng: The run's key. Step n draws from `fold_in(rng, n)`, so that a resumed run draws the same
      numbers as one that was never interrupted.
  """

  step: Int[Array, ""]
  params: PyTree
  opt_state: PyTree
  router_state: PyTree
  rng: Key[Array, ""]


def init_variables(
  model: nn.Module, key: Key[Array, ""], seq_len: int, batch_size: int = 1
) -> PyTree:
  """Draws the model's variables, in Flax's boxes that name each axis; JAX can trace this."""
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
  """Returns the state before the first step.

  The function is pure: `jit`, `eval_shape` and `vmap` over keys all work.

  Args:
    model: A model of `models/`.
    optimizer: An optimizer of `optimizers.py`.
    key: The key of the run. Weights are drawn from `fold_in(key, 0)`; the steps' randomness comes
      from `fold_in(key, 1)`.
    seq_len: The length of the dummy input's rows. No weight's shape depends on it.
    batch_size: The number of the dummy input's rows, which must suit the mesh's data axes and the
      routing groups.
  """
  return first_state(
    init_variables(model, jax.random.fold_in(key, 0), seq_len, batch_size), optimizer, key
  )


def first_state(
  boxed: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
  """Returns the state before the first step, given its variables; the function is pure.

  Args:
    boxed: The result of `init_variables`.
    optimizer: An optimizer of `optimizers.py`.
    key: The key of the run, as in `init_state`.
  """
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
  """Returns a state with a `NamedSharding` in place of every array.

  Weights follow `sharding.RULES`. A moment of the optimizer is sharded as the weight whose path is
  the end of the moment's path and whose shape is equal. A factor of Adafactor is sharded as that
  weight, without the dimension over which the factor averages. Everything else, which is counters,
  is replicated.

  Args:
    mesh: The mesh on which the state will live.
    boxed: The abstract result of `init_variables`.
    abstract: The abstract result of `init_state`.
  """
  shardings = sharding.param_shardings(mesh, boxed)
  replicated: Any = NamedSharding(mesh, PartitionSpec())
  weights = {
    keys(path): (leaf.shape, weight_sharding)
    for (path, leaf), weight_sharding in zip(
      jax.tree_util.tree_leaves_with_path(abstract.params),
      jax.tree.leaves(shardings["params"]),
      strict=True,
    )
  }

  def moment_sharding(path, leaf):
    names = keys(path)
    for start in range(len(names)):
      shape, weight_sharding = weights.get(names[start:], (None, None))
      if shape == leaf.shape:
        return weight_sharding
      if not shape:
        continue
      # The name before the weight's path is that of Adafactor's slot.
      lost = _averaged(names[start - 1], names[start:], shape, leaf.shape)
      if lost is not None:
        spec = (axes for i, axes in enumerate(weight_sharding.spec) if i != lost)
        return NamedSharding(mesh, PartitionSpec(*spec))
    return replicated

  return TrainState(
    step=replicated,
    params=shardings["params"],
    opt_state=jax.tree_util.tree_map_with_path(moment_sharding, abstract.opt_state),
    router_state=shardings.get("router_state", {}),
    rng=replicated,
  )


def _averaged(
  slot: str, path: tuple[str, ...], weight: tuple[int, ...], factor: tuple[int, ...]
) -> int | None:
  """Returns the dimension of a weight over which a factor of Adafactor averages.

  Optax's `v_row` averages over the longest dimension, and `v_col` over the second longest. Axes
  that count layers or experts are never averaged over.

  Args:
    slot: The name of the factor's slot.
    path: The path of the weight.
    weight: The shape of the weight.
    factor: The shape of the leaf that may be a factor.

  Returns:
    The dimension, or None if the leaf is not such a factor.
  """
  rank, num_stacked = {"v_row": -1, "v_col": -2}.get(slot), stacked(path, len(weight))
  if rank is None or len(weight) - num_stacked < 2:
    return None
  lost = num_stacked + int(np.argsort(weight[num_stacked:])[rank])
  return lost if weight[:lost] + weight[lost + 1 :] == factor else None


def create(
  mesh: Mesh,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  seed: int,
  seq_len: int,
  batch_size: int = 1,
) -> tuple[TrainState, Any]:
  """Returns the abstract initial state, and a function that draws the state on the mesh.

  Args:
    mesh: The mesh on which the state will live.
    model: A model of `models/`.
    optimizer: An optimizer of `optimizers.py`.
    seed: The seed of the run's key.
    seq_len: See `init_state`.
    batch_size: See `init_state`.

  Returns:
    A state of `jax.ShapeDtypeStruct` with shardings, and a function without arguments that returns
    the state.
  """

  def init(key):
    return init_state(model, optimizer, key, seq_len, batch_size)

  key = jax.random.key(seed)
  boxed = jax.eval_shape(lambda key: init_variables(model, key, seq_len, batch_size), key)
  shapes = jax.eval_shape(lambda boxed, key: first_state(boxed, optimizer, key), boxed, key)
  places = state_shardings(mesh, boxed, shapes)
  abstract = jax.tree.map(
    lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
  )
  # This program runs only once, so it is not worth optimising. On a CPU that would take longer than
  # compiling the training step.
  options = {"xla_backend_optimization_level": 0} if sharding.platform(mesh) == "cpu" else {}
  return abstract, lambda: jax.jit(init, out_shardings=places, compiler_options=options)(key)


def begin(
  abstract: TrainState, optimizer: optax.GradientTransformation, seed: int, weights: TrainState
) -> TrainState:
  """Returns the state before the first step of a run that begins with given weights.

  Args:
    abstract: The abstract initial state of the run; see `create`.
    optimizer: The optimizer of the run.
    seed: The seed of the run's key.
    weights: A state of which only `params` and `router_state` are read. They are cast to the dtypes
      of the run, and their arrays may not be used any more.
  """

  def first(params, router_state):
    params = jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), params, abstract.params)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      router_state=router_state,
      rng=jax.random.fold_in(jax.random.key(seed), 1),
    )

  places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(first, out_shardings=places, donate_argnums=0)(
    weights.params, weights.router_state
  )


def _unbox(variables: PyTree) -> PyTree:
  """Returns the variables without Flax's metadata boxes."""

  # nn.unbox would also apply logical rules that it finds in a context. Here `state_shardings`
  # decides where weights live.
  def is_box(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)

  return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, variables, is_leaf=is_box)
