"""What makes routing random in training."""

from __future__ import annotations

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped


class Place(typing.NamedTuple):
  """Which of a batch's groups a microbatch holds: microbatch m of `count` has rows m, m + count,
  ...

  Attributes:
    index: m, from 0; it may be traced.
    count: microbatches of the batch.
    block: consecutive groups a row, 1 where a group is a row or more.
  """

  index: Int[Array, ""] | int
  count: int
  block: int = 1


def own(draw: Callable[[int], Array], groups: int, place: Place | None) -> Shaped[Array, "G *rest"]:
  """What each of G groups draws, whether its batch is cut into microbatches or not.

  Args:
    draw: number of groups -> what they draw, with a leading axis of groups. It draws for the whole
      batch, of which the microbatch keeps its own part, so that it takes `place.count` times as
      many random numbers as are used, and the memory for them while it draws. For keys that is
      nothing; for `jitter` on a wide input it is the whole batch's.
    groups: G.
    place: of a microbatch; None: the groups are those of the whole batch.
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
  """x times U[1 - epsilon, 1 + epsilon], elementwise, in float32 (Switch, appendix C: "input
  jitter").

  For the router's own copy of its input; experts see clean input. `epsilon` 0 returns x in float32.
  Where the first axis of x is a microbatch's groups, `place` says which of the batch's these are,
  see `own`.

  Deviation: ST-MoE's text applies it to the logits; this is the input, as in Switch and
  Mesh-TensorFlow.
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
  """H(x) = logits + noise_std * N(0, 1) (Shazeer 2017 Eq. 4) in float32; the logits themselves
  without key or training.

  The same key draws the same noise, so a loss that needs H(x) calls this again with what the router
  had. Noise of the first tokens does not depend on how many follow.
  """
  logits = logits.astype(jnp.float32)
  if key is None or not train:
    return logits
  return logits + noise_std * jax.random.normal(key, logits.shape, jnp.float32)
