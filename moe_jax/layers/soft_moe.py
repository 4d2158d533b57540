"""Soft MoE, in which experts process weighted averages of tokens.

Every token then gets a weighted average of the experts' outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from moe_jax.layers.aux import Aux, LayerContext, LayerRouting, measured
from moe_jax.layers.ffn import experts
from moe_jax.layers.init import parameter
from moe_jax.layers.moe import GroupOptions
from moe_jax.routing import metrics
from moe_jax.sharding import constrain

EPSILON = 1e-6  # added to squared norms
_MASKED = jnp.finfo(jnp.float32).min  # the logit of padding, whose probability is then 0


class SoftMoeLayer(nn.Module):
  """A layer whose E*p slots each average the tokens of a group, and each token averages the slots.

  Paper: Soft MoE (arXiv 2308.00951) Sec. 2, as the vmoe repository implements it. Expert i
  processes slots (i, 1) to (i, p).

      L = scale * normalize(X) normalize(mu)
      D = softmax of L over tokens,  C = softmax of L over slots
      X~ = D^T X,  Y~_(i,j) = f_i(X~_(i,j)),  Y = C Y~

  X are the S tokens of the group, and mu [D, E, p] is one learned direction per slot. Both are
  scaled to unit length along the model width, and `scale` is learned, so that |L| <= scale whatever
  the width. No token is dropped, and no balance loss is needed. The layer has the signature of
  `MoeLayer`, so that a block need not know which of the two it holds.

  This layer is not causal: a token's output depends on all tokens of its group, including later
  ones and those of other documents in its row.

  Padding, which vmoe does not have, enters no average, and the experts' part of its output is 0.

  Attributes:
    num_experts: Number of experts E.
    slots: Number of slots p per expert. The experts cost as much as E*p tokens per group would.
    d_ff: Hidden width of one expert.
    activation: A key of `ACTIVATIONS`.
    shared: Makes the dense FFN that every token visits; None means that there is none.
    groups: Options that say which tokens are averaged together.
    ffn_bias: See `MoeLayer`.
    expert_bias: See `MoeLayer`.
    output_scale: Factor on the initial output projections.
    dtype: Dtype of the activations. Parameters, logits and both softmaxes are float32.
  """

  num_experts: int
  slots: int
  d_ff: int
  activation: str
  shared: Callable[..., nn.Module] | None = None
  groups: GroupOptions = GroupOptions()
  ffn_bias: str = "none"
  expert_bias: bool = False
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting | None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
    """Returns the output of the layer, and its metrics; there are no losses.

    Args:
      x: Activations of B rows of L tokens.
      context: What the layer must know about the tokens.
      routing: Must contain neither a balancing bias nor a stored plan. Its other fields are not
        used.

    Raises:
      ValueError: `routing` has a balancing bias or a stored plan.
    """
    if routing is not None and jax.tree.leaves((routing.bias, routing.stored)):
      raise ValueError(
        "Soft MoE chooses no experts: it takes neither a balancing bias nor a stored plan"
      )
    size = self.groups.tokens(*x.shape[:2])

    def grouped(t):
      return constrain(
        t.reshape(-1, size, *t.shape[2:]), "group", *(None,) * (t.ndim - 1)
      )  # [G, S, ...]

    groups, valid = grouped(x.astype(self.dtype)), grouped(context.segment_ids > 0)
    logits = self._logits(groups)
    real = valid[:, :, None, None]
    dispatch = jax.nn.softmax(jnp.where(real, logits, _MASKED), axis=1)
    combine = jnp.where(real, jax.nn.softmax(logits, axis=(2, 3)), 0.0)
    inputs = jnp.einsum("gsep,gsd->egpd", dispatch.astype(groups.dtype), groups)
    weights = experts(
      self,
      self.num_experts,
      x.shape[-1],
      self.d_ff,
      self.activation,
      self.ffn_bias,
      self.output_scale,
      self.expert_bias,
    )
    outputs = weights.buffers(inputs.reshape(self.num_experts, -1, x.shape[-1]))
    y = jnp.einsum(
      "gsep,egpd->gsd", combine.astype(groups.dtype), outputs.reshape(inputs.shape)
    ).reshape(x.shape)
    if self.shared is not None:
      y += self.shared(name="shared")(x, context)[0]
    aux = measured(_sums(logits, valid))
    if context.return_routing:
      # The expert whose slots have the largest combine weight together; E for padding.
      first = jnp.argmax(_by_expert(logits), axis=-1)
      aux.metrics["top1_expert"] = (
        jnp.where(valid, first, self.num_experts).astype(jnp.int32).reshape(x.shape[:2])
      )
    return constrain(y, "batch", "length", "act_embed"), aux

  def _logits(self, x: Float[Array, "G S D"]) -> Float[Array, "G S E P"]:
    """Returns `scale` times the cosine between each token and each slot's direction, in float32."""
    mu = parameter(
      self,
      "mu",
      nn.initializers.lecun_normal(),
      (x.shape[-1], self.num_experts, self.slots),
      ("embed", "router", None),
    )
    scale = parameter(self, "scale", nn.initializers.ones, (), ())
    return scale * jnp.einsum(
      "gsd,dep->gsep",
      _normalize(x.astype(jnp.float32), -1),
      _normalize(mu, 0),
      precision=jax.lax.Precision.HIGHEST,
    )


def _normalize(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
  """Returns `x` scaled to unit length along `axis`; zeros stay zeros."""
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True) + EPSILON)


def _by_expert(logits: Float[Array, "G S E P"]) -> Float[Array, "G S E"]:
  """Returns logits over experts whose softmax is the combine weight of each expert's slots."""
  return jax.nn.logsumexp(logits, axis=-1)


def _sums(logits: Float[Array, "G S E P"], valid: Bool[Array, "G S"]) -> dict[str, Array]:
  """Returns the counterpart of `routing.metrics.sums`.

  The load of an expert is the sum of the tokens' combine weights, each real token counts as one
  assignment, and nothing is ever dropped.
  """
  by_expert = _by_expert(logits)
  weights = jnp.where(valid[..., None], jax.nn.softmax(by_expert, axis=-1), 0.0)
  tokens, zero = jnp.sum(valid), jnp.zeros((), jnp.int32)
  return {
    "assigned": jnp.sum(weights, axis=(0, 1)),
    "assignments": tokens,
    "dropped": zero,
    "tokens": tokens,
    "unserved": zero,
    "entropy": metrics.summed_entropy(by_expert, valid),
    "logit_max": metrics.logit_max(logits.reshape(*valid.shape, -1), valid),
  }
