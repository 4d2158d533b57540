"""A long short-term memory over time, whose state forgets at the start of each document."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_jax.layers.init import projection
from moe_jax.sharding import constrain

GATES = (
  "input",
  "forget",
  "cell",
  "output",
)  # their order in the weights, as in Flax's cells: i, f, g, o


class Lstm(nn.Module):
  """LSTM (Hochreiter and Schmidhuber 1997; forget gates), with a recurrent projection if asked for
  (Sak et al. 2014).

      i, f, o = sigmoid(W x_t + R r_(t-1) + b),  g = tanh(the same),  c_t = f c_(t-1) + i g
      m_t = o tanh(c_t),  r_t = P m_t (m_t itself without projection)

  The output is r_t. It computes what `flax.linen.OptimizedLSTMCell` does under `nn.RNN`, which has
  no P and does not forget; here W x is one product for all steps, and the loop has R and P alone.

  c and r are zeros before a row's first token and before each token of position 0: rows are packed
  with documents, and nothing crosses a document's end. Deviation: language models of 2017 carried
  the state from batch to batch.

  One bias a gate, as Flax has it; that of the forget gate begins at 1 (Jozefowicz et al. 2015), the
  others at 0.

  Attributes:
    units: U, of the memory.
    projected: R, the width of the output and of what recurs; 0: U, and there is no P.
    dtype: of the activations; parameters and c are float32.
  """

  units: int
  projected: int = 0
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], positions: Int[Array, "B L"]
  ) -> Float[Array, "B L R"]:
    rows, width, out = x.shape[0], x.shape[-1], self.projected or self.units
    gates = (len(GATES), self.units)
    into = projection(
      self, "input", (width, *gates), ("embed", None, "mlp"), fan_in=width, dtype=self.dtype
    )
    # All-gathers of R and P belong before the loop.
    recurrent = constrain(
      projection(
        self, "recurrent", (out, *gates), ("embed", None, "mlp"), fan_in=out, dtype=self.dtype
      ),
      None,
      None,
      "act_mlp",
    )
    bias = self.param(
      "gate_bias", nn.with_logical_partitioning(_forget_is_open, (None, "mlp")), gates, jnp.float32
    )
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

    def step(carry, seen):
      (c, r), (driven, begins) = carry, seen
      c, r = (jnp.where(begins[:, None], 0, state) for state in (c, r))
      i, f, g, o = jnp.moveaxis(
        (driven + jnp.einsum("br,rgu->bgu", r, recurrent)).astype(jnp.float32), 1, 0
      )
      c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
      m = (jax.nn.sigmoid(o) * jnp.tanh(c)).astype(self.dtype)
      r = m if down is None else m @ down
      return (c, r), r

    first = jnp.zeros((rows, self.units), jnp.float32), jnp.zeros((rows, out), self.dtype)
    _, outputs = jax.lax.scan(step, first, (driven, positions.T == 0))
    return constrain(outputs.swapaxes(0, 1), "batch", "length", "act_embed")


def _forget_is_open(key, shape, dtype):
  del key
  return jnp.zeros(shape, dtype).at[GATES.index("forget")].set(1.0)
