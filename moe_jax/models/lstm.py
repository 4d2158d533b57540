"""LSTM layers with a mixture of experts between them.

Paper: Shazeer et al. 2017 (arXiv 1701.06538), appendices C and D.
"""

from __future__ import annotations

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from moe_jax.layers import Aux, LayerContext, LayerRouting
from moe_jax.models.stack import Factory, make_block
from moe_jax.sharding import constrain


class LstmBlock(nn.Module):
  """One LSTM layer, which experts may follow (appendix C.1).

      x <- x + dropout(lstm(x)),  then, in a layer with experts,  x <- x + dropout(sigmoid(moe(x)))

  There are no norms.

  Attributes:
    lstm: Makes the LSTM, whose output is as wide as x.
    moe: Makes the layer of experts, which sees all time steps of all rows at once. None means that
      there are no experts.
    dropout: Probability of dropout on what the LSTM and the experts add.
  """

  lstm: Factory
  moe: Factory | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], context: LayerContext, routing: LayerRouting | None = None
  ) -> tuple[Float[Array, "B L D"], Aux]:
    """Returns the output of the layer, and what its experts report."""

    def drop(y):
      return nn.Dropout(self.dropout, deterministic=not context.train)(y)

    x, aux = (
      x + drop(self.lstm(name="lstm")(x, context.positions, context.cached is not None)),
      Aux(),
    )
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
  """Returns a factory of a layer.

  The paper's model has two layers, of which the first has experts. A token's experts depend only on
  its own state, so that the mixture can be applied to all time steps at once ("convolutionally").
  The batch that the balance losses see is the group of tokens that are routed together
  (`GroupOptions`). Deviation: the softmax after the layers is always a full one, where the paper
  samples in training.

  Args:
    has_experts: Whether experts follow the layer's LSTM.
    scanned: Whether the layer is in the body of a scan.
    lstm: Makes the LSTM.
    moe: Makes the experts; None if no layer has any.
    dropout: Probability of dropout on what the LSTM and the experts add.
    remat: A key of `REMAT`.
  """
  return make_block(
    LstmBlock, remat, scanned, lstm=lstm, moe=moe if has_experts else None, dropout=dropout
  )
