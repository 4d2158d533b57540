"""Random perturbations of routing in training: jitter of the input and noise on the logits."""

from __future__ import annotations

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped


class Place(typing.NamedTuple):
  """The position of a microbatch in its batch.

  Microbatch m of `count` holds the rows m, m + count, m + 2 * count and so on of the batch.

  Attributes:
    index: The number of the microbatch, m, counted from 0. It may be a traced value.
    count: The number of microbatches in the batch.
    block: The number of consecutive groups per row. It is 1 if a group spans one row or more.
  """

  index: Int[Array, ""] | int
  count: int
  block: int = 1


def own(draw: Callable[[int], Array], groups: int, place: Place | None) -> Shaped[Array, "G *rest"]:
  """Returns the random values of G groups, which do not depend on the number of microbatches.

  Args:
    draw: A function from the number of groups to their random values, with a leading axis of
      groups. It is called for the whole batch, and the microbatch keeps its own part. It therefore
      draws `place.count` times as many values as are used and needs the memory for them. This cost
      is negligible for keys; for `jitter` it is that of the whole batch's input.
    groups: The number of groups, G.
    place: The position of the microbatch in its batch. None means that the groups are the whole
      batch.
  """
  if place is None:
    return draw(groups)
  whole = draw(groups * place.count)
  by_microbatch = whole.reshape(-1, place.count, place.block, *whole.shape[1:])
  mine = jax.lax.dynamic_index_in_dim(by_microbatch, place.index, axis=1, keepdims=False)
  return mine.reshape(groups, *whole.shape[1:])


def jitter(
  key: Key[Array, ""], x: Float[Array, "*S D"], epsilon: float, place: Place | None = None
) -> Float[Array, "*S D"]:
  """Multiplies x elementwise by U[1 - epsilon, 1 + epsilon] (Switch, appendix C: "input jitter").

  It is meant for the router's own copy of its input; the experts see the clean input.

  Args:
    key: PRNG key of the whole batch.
    x: The input of the router. If `place` is given, its first axis is the axis of groups.
    epsilon: The half-width of the interval of the factors. 0 returns x in float32.
    place: The position of the microbatch that x belongs to, see `own`. None means that x is the
      whole batch.

  Returns:
    The jittered input in float32.

  Deviation: ST-MoE's text applies jitter to the logits. Here it is applied to the input, as in
  Switch and Mesh-TensorFlow.
  """

  def draw(first):
    return jax.random.uniform(key, (first, *x.shape[1:]), jnp.float32, 1.0 - epsilon, 1.0 + epsilon)

  return x.astype(jnp.float32) * own(draw, x.shape[0], place)


def perturb(
  logits: Float[Array, "S E"],
  noise_std: Float[Array, "S E"] | float,
  key: Key[Array, ""] | None,
  train: bool,
) -> Float[Array, "S E"]:
  """Returns H(x) = logits + noise_std * N(0, 1) in float32 (Shazeer 2017 Eq. 4).

  Without a key, or outside training, it returns the logits in float32.

  The same key draws the same noise, so that a loss that needs H(x) can call this function again
  with the arguments of the router. The noise of the first tokens does not depend on the number of
  tokens that follow.
  """
  logits = logits.astype(jnp.float32)
  if key is None or not train:
    return logits
  return logits + noise_std * jax.random.normal(key, logits.shape, jnp.float32)
