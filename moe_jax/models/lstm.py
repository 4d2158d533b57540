"""LSTM layers with a mixture of experts between them (Shazeer et al. 2017, arXiv 1701.06538,
appendices C and D)."""

from __future__ import annotations

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from moe_jax.layers import Aux, LayerContext, LayerRouting
from moe_jax.models.stack import Factory, make_block
from moe_jax.sharding import constrain


class LstmBlock(nn.Module):
  """x + drop(lstm(x)) and, in layers with experts, then x + drop(sigmoid(moe(x))): appendix C.1.
  There are no norms.

  Attributes:
    lstm: makes the LSTM, whose output is as wide as x.
    moe: makes the layer of experts, which sees all time steps of all rows at once; None: there is
      none.
    dropout: probability, on what each of the two adds.
  """

  lstm: Factory
  moe: Factory | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting | None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
    def drop(y):
      return nn.Dropout(self.dropout, deterministic=not context.train)(y)

    x, aux = x + drop(self.lstm(name="lstm")(x, context.positions)), Aux()
    if self.moe is not None:
      y, aux = self.moe(name="moe")(x, context, routing)
      x = x + drop(jax.nn.sigmoid(y))
    return constrain(x, "batch", "length", "act_embed"), aux


def lstm_block(
  has_experts: bool,
  scanned: bool,
  *,
  lstm: Factory,
  moe: Factory | None,
  dropout: float = 0.0,
  remat: str = "none",
) -> Factory:
  """Returns a factory of a layer. Two layers, the first with experts, are the paper's model.

  A token's experts depend on its own state alone, so that the mixture is applied
  "convolutionally": how many tokens are routed together (`GroupOptions`) is the batch that the
  balance losses see. Deviation: the softmax after the layers is a full one, also in training (the
  paper samples).

  Args:
    has_experts: Whether experts follow the layer's LSTM.
    scanned: Whether the layer is in the body of a scan.
    lstm: Makes the LSTM.
    moe: Makes the experts; None where no layer has any.
    dropout: Probability of dropout on the output of both.
    remat: A key of `REMAT`.
  """
  return make_block(
    LstmBlock, remat, scanned, lstm=lstm, moe=moe if has_experts else None, dropout=dropout
  )
