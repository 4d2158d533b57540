"""The plain form of attention: a softmax over all keys at once, and which keys a query sees."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The score of a masked key. It is finite so that a query without any visible key gets numbers
# instead of NaN.
MASKED = -0.7 * jnp.finfo(jnp.float32).max


def attend(
  q: Float[Array, "B Lq K G P"],
  k: Float[Array, "B Lk K P"],
  v: Float[Array, "B Lk K U"],
  mask: Bool[Array, "B Lq Lk"],
  *,
  bias: Float[Array, "#B K G Lq Lk"] | None = None,
  sink: Float[Array, "K G"] | None = None,
  drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "B Lq K G U"]:
  """Returns averages of the values with weights softmax(q k + bias).

  G query heads read each of the K key-value heads.

  Args:
    q: Queries, already scaled.
    k: Keys.
    v: Values. Their width U may differ from the width P of queries and keys.
    mask: True where a query sees a key. A query that sees no key gets the plain average of all
      values, which has no meaning.
    bias: Added to the scores. None adds nothing.
    sink: A score of each query head that stands beside those of the keys in the softmax, and whose
      value is 0. None means that the weights of a query add up to 1.
    drop: Dropout, which is applied to the weights.
  """
  # The softmax is float32 whatever the dtype of the activations.
  scores = jnp.einsum("bqhgp,bkhp->bhgqk", q, k, preferred_element_type=jnp.float32)
  scores = scores if bias is None else scores + bias
  scores = jnp.where(mask[:, None, None], scores, MASKED)
  if sink is not None:
    beside = jnp.broadcast_to(sink[:, :, None, None], (*scores.shape[:-1], 1))
    scores = jnp.concatenate([scores, beside], axis=-1)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  if sink is not None:
    weights = weights[..., :-1]
  return jnp.einsum("bhgqk,bkhp->bqhgp", drop(weights), v)


def visible(
  segment_ids: Int[Array, "B L"], causal: bool = True, window: int = 0
) -> Bool[Array, "B L L"]:
  """Returns True where a query (second axis) sees a key (last axis) in self-attention.

  Args:
    segment_ids: Document of each token within its row. A query sees only keys of its own document.
      Padding has the id 0 and is treated as a document of its own.
    causal: Whether a query sees no later keys.
    window: The number of last keys that a query sees, its own included; 0 means no limit. It has no
      effect unless `causal`.
  """
  same_document = segment_ids[:, :, None] == segment_ids[:, None, :]
  if not causal:
    return same_document
  # Documents are contiguous, so that places in the row order tokens as positions in a document do.
  place = jnp.arange(segment_ids.shape[1])
  in_reach = place[:, None] >= place
  if window:
    in_reach &= place[:, None] - place < window
  return in_reach & same_document
