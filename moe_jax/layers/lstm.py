"""A long short-term memory (LSTM) over time, whose state is reset at the start of each document."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers.init import parameter, projection
from moe_jax.sharding import constrain

# The order of the gates i, f, g and o in the weights, as in Flax's cells.
GATES = ("input", "forget", "cell", "output")


class Lstm(nn.Module):
  """An LSTM with forget gates (Hochreiter and Schmidhuber 1997) and an optional output projection.

  The projection is recurrent (Sak et al. 2014). With W, R and b of each gate:

      i, f, o = sigmoid(W x_t + R r_(t-1) + b),  g = tanh(W x_t + R r_(t-1) + b)
      c_t = f c_(t-1) + i g,  m_t = o tanh(c_t),  r_t = P m_t, or m_t without projection

  The output is r_t. It is that of `flax.linen.OptimizedLSTMCell` under `nn.RNN`, which has no P and
  does not reset its state within a row. Here W x is one product for all steps, so that the loop
  holds only the products with R and P.

  c and r are zeros before a row's first token and before each token of position 0, because rows are
  packed with documents and nothing may cross a document's end. Deviation: language models of 2017
  carried the state from batch to batch.

  Each gate has one bias per unit, as in Flax. That of the forget gate begins at 1 (Jozefowicz et
  al. 2015), and the others begin at 0.

  Attributes:
    units: Number U of memory cells.
    projected: Width R of the output and of the recurrent input; 0 means U without a projection P.
    dtype: Dtype of the activations. Parameters and c are float32.
  """

  units: int
  projected: int = 0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], positions: Int[Array, "B L"], cached: bool = False
  ) -> Float[Array, "B L R"]:
    """Returns the output at every time step; the state is reset wherever `positions` is 0.

    Args:
      x: The input.
      positions: Place of each token in its document.
      cached: Whether x continues the rows of the call before, whose last c and r are in the
        collection "cache".
    """
    rows, width, out = x.shape[0], x.shape[-1], self.projected or self.units
    gates = (len(GATES), self.units)
    into = projection(
      self, "input", (width, *gates), ("embed", None, "mlp"), fan_in=width, dtype=self.dtype
    )
    # These constraints place the all-gathers of R and P before the loop instead of in every step.
    recurrent = constrain(
      projection(
        self, "recurrent", (out, *gates), ("embed", None, "mlp"), fan_in=out, dtype=self.dtype
      ),
      None,
      None,
      "act_mlp",
    )
    bias = parameter(self, "gate_bias", _forget_is_open, gates, (None, "mlp"))
    down = (
      constrain(
        projection(
          self,
          "projection",
          (self.units, out),
          ("mlp", "embed"),
          fan_in=self.units,
          dtype=self.dtype,
        ),
        "act_mlp",
        None,
      )
      if self.projected
      else None
    )
    driven = jnp.einsum("bld,dgu->lbgu", x, into) + bias.astype(self.dtype)
    driven = constrain(driven, "length", "batch", None, "act_mlp")

    def step(carry, inputs):
      (c, r), (driven, begins) = carry, inputs
      c, r = (jnp.where(begins[:, None], 0, state) for state in (c, r))
      # Gates and memory are float32; only the matrix products have the dtype of the activations.
      i, f, g, o = jnp.moveaxis(
        (driven + jnp.einsum("br,rgu->bgu", r, recurrent)).astype(jnp.float32), 1, 0
      )
      c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
      m = (jax.nn.sigmoid(o) * jnp.tanh(c)).astype(self.dtype)
      r = m if down is None else m @ down
      return (c, r), r

    first = jnp.zeros((rows, self.units), jnp.float32), jnp.zeros((rows, out), self.dtype)
    kept = self.variable("cache", "state", lambda: first) if cached else None
    # The scan runs over the leading axis, which is time.
    last, outputs = jax.lax.scan(
      step, first if kept is None else kept.value, (driven, positions.T == 0)
    )
    if kept is not None:
      kept.value = last
    return constrain(outputs.swapaxes(0, 1), "batch", "length", "act_embed")


def _forget_is_open(key, shape, dtype):
  """Initialises the biases of the gates: 1 for the forget gate and 0 for the others."""
  del key
  return jnp.zeros(shape, dtype).at[GATES.index("forget")].set(1.0)
