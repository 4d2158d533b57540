"""Soft MoE: experts work on weighted averages of tokens, and every token gets a weighted average of
their outputs."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from moe_jax.layers.aux import Aux, LayerContext, LayerRouting, measured
from moe_jax.layers.ffn import experts
from moe_jax.layers.moe import GroupOptions
from moe_jax.routing import metrics
from moe_jax.sharding import constrain

EPSILON = 1e-6  # added to squared norms
_MASKED = jnp.finfo(jnp.float32).min  # a logit whose probability is 0


class SoftMoeLayer(nn.Module):
  """Each of E*p slots averages the tokens of its group, expert i serves slots (i, 1..p), each token
  averages the slots.

  Paper: Soft MoE (arXiv 2308.00951) Sec. 2, as the vmoe repository has it.

      L = scale * normalize(X) normalize(mu),  D = softmax over tokens of L,  C = softmax over slots
                                               of L
      X~ = D^T X,  Y~_(i,j) = f_i(X~_(i,j)),  Y = C Y~

  X are the group's S tokens, mu [D, E, p] one learned direction a slot; both are scaled to unit
  length along the model width, and `scale` is learned, so that |L| <= scale whatever the width.
  Nothing is dropped, no balance loss is needed, and the layer has the signature of `MoeLayer`, so
  that a block need not know which of the two it holds. A token's output depends on all tokens of
  its group, later ones and those of other documents in its row included: this layer is not causal.

  Padding, of which vmoe has none, enters no average and gets 0.

  Attributes:
    num_experts: E.
    slots: p, of each expert. The experts cost what E*p tokens a group would.
    d_ff: hidden width of one expert.
    activation: a key of `ACTIVATIONS`.
    ffn_bias: as in `MoeLayer`.
    shared: makes the dense FFN that every token visits; None: there is none.
    groups: Which tokens are averaged together.
    output_scale: factor on the initial output projections.
    dtype: of the activations; parameters, logits and both softmaxes are float32.
  """

  num_experts: int
  slots: int
  d_ff: int
  activation: str
  shared: Callable[..., nn.Module] | None = None
  groups: GroupOptions = GroupOptions()
  ffn_bias: str = "none"
  output_scale: float = 1.0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting | None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
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
    )
    outputs = weights.buffers(inputs.reshape(self.num_experts, -1, x.shape[-1]))
    y = jnp.einsum(
      "gsep,egpd->gsd", combine.astype(groups.dtype), outputs.reshape(inputs.shape)
    ).reshape(x.shape)
    if self.shared is not None:
      y += self.shared(name="shared")(x, context)[0]
    aux = measured(_sums(logits, valid))
    if context.return_routing:
      first = jnp.argmax(_by_expert(logits), axis=-1)
      aux.metrics["top1_expert"] = (
        jnp.where(valid, first, self.num_experts).astype(jnp.int32).reshape(x.shape[:2])
      )
    return constrain(y, "batch", "length", "act_embed"), aux

  def _logits(self, x: Float[Array, "G S D"]) -> Float[Array, "G S E P"]:
    """scale * cosine of each token and each slot's direction, in float32 whatever the dtype of the
    model."""
    mu = self.param(
      "mu",
      nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "router", None)),
      (x.shape[-1], self.num_experts, self.slots),
      jnp.float32,
    )
    scale = self.param(
      "scale", nn.with_logical_partitioning(nn.initializers.ones, ()), (), jnp.float32
    )
    return scale * jnp.einsum(
      "gsd,dep->gsep",
      _normalize(x.astype(jnp.float32), -1),
      _normalize(mu, 0),
      precision=jax.lax.Precision.HIGHEST,
    )


def _normalize(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
  """Unit length along `axis`; zeros stay zeros."""
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True) + EPSILON)


def _by_expert(logits: Float[Array, "G S E P"]) -> Float[Array, "G S E"]:
  """Logits over experts whose softmax is the combine weight that each expert's slots have
  together."""
  return jax.nn.logsumexp(logits, axis=-1)


def _sums(logits: Float[Array, "G S E P"], valid: Bool[Array, "G S"]) -> dict[str, Array]:
  """As `routing.metrics.sums`: an assignment is a token's combine weight, and nothing is ever
  dropped."""
  by_expert = _by_expert(logits)
  weights = jnp.where(valid[..., None], jax.nn.softmax(by_expert, axis=-1), 0.0)
  tokens, none = jnp.sum(valid), jnp.zeros((), jnp.int32)
  return {
    "assigned": jnp.sum(weights, axis=(0, 1)),
    "assignments": tokens,
    "dropped": none,
    "tokens": tokens,
    "unserved": none,
    "entropy": metrics.summed_entropy(by_expert, valid),
    "logit_max": metrics.logit_max(logits.reshape(*valid.shape, -1), valid),
  }
