"""The layers of a Transformer, of which any may have experts."""

from __future__ import annotations

from collections.abc import Hashable

from flax import linen as nn
from jaxtyping import Array, Float

from moe_jax.layers import Aux, LayerContext, LayerRouting
from moe_jax.models.stack import Factory, make_block
from moe_jax.sharding import constrain


class Block(nn.Module):
  """A pre-norm layer (Xiong et al. 2020) of self-attention and an FFN, which may have experts.

  Every sublayer computes x + dropout(sublayer(norm(x))) with a norm of its own. The sublayers are
  `attention`, `cross` if there is one, `extra` if there is one, and `ffn`.

  Attributes:
    attention: Makes the self-attention.
    ffn: Makes the dense FFN or the layer of experts, (x, context, routing) -> (y, Aux).
    norm: Makes a normalisation.
    cross: Makes the attention to the encoder's output `context.memory`; None means that there is
      none.
    extra: Makes a dense FFN right before `ffn` (ST-MoE, appendix C); None means that there is none.
    dropout: Probability of dropout on the output of each sublayer.
  """

  attention: Factory
  ffn: Factory
  norm: Factory
  cross: Factory | None = None
  extra: Factory | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting | None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
    """Returns the output of the layer, and what its experts report."""

    def drop(y):
      return nn.Dropout(self.dropout, deterministic=not context.train)(y)

    x = x + drop(self.attention(name="attention")(self.norm(name="attention_norm")(x), context))
    if self.cross is not None:
      x = x + drop(
        self.cross(name="cross_attention")(
          self.norm(name="cross_attention_norm")(x),
          context,
          context.memory,
          context.memory_segments,
        )
      )
    if self.extra is not None:
      x = x + drop(self.extra(name="extra")(self.norm(name="extra_norm")(x), context)[0])
    y, aux = self.ffn(name="ffn")(self.norm(name="ffn_norm")(x), context, routing)
    return constrain(x + drop(y), "batch", "length", "act_embed"), aux


def transformer_block(
  kind: Hashable,
  scanned: bool,
  *,
  attention: Factory,
  dense: Factory,
  moe: Factory | None,
  norm: Factory,
  cross: Factory | None = None,
  global_attention: Factory | None = None,
  hash_moe: Factory | None = None,
  extra_ffn: bool = False,
  dropout: float = 0.0,
  remat: str = "none",
) -> Factory:
  """Returns a factory of a layer.

  Args:
    kind: Whether the layer's FFN is `moe` (otherwise it is `dense`), or "hash" if it is `hash_moe`;
      with `global_attention`, a pair of this and whether its attention is the global one.
    scanned: Whether the layer is in the body of a scan.
    attention: Makes the self-attention.
    dense: Makes the FFN of a layer without experts.
    moe: Makes the FFN of a layer with experts; None if no layer has any.
    norm: Makes a normalisation.
    cross: Makes the attention to an encoder's output; None means that there is none.
    global_attention: Makes the self-attention of layers whose kind says so. None means that that of
      all layers is alike.
    hash_moe: Makes the FFN of a layer whose tokens take experts by their ids; None without any.
    extra_ffn: Whether a `dense` FFN with its own norm and residual comes right before the experts
      of a layer (ST-MoE).
    dropout: Probability of dropout on the output of each sublayer.
    remat: A key of `REMAT`.
  """
  has_experts, is_global = kind if isinstance(kind, tuple) else (kind, False)
  return make_block(
    Block,
    remat,
    scanned,
    attention=global_attention if is_global else attention,
    ffn={False: dense, True: moe, "hash": hash_moe}[has_experts],
    norm=norm,
    cross=cross,
    extra=dense if has_experts and extra_ffn else None,
    dropout=dropout,
  )
