"""What is computed: experts' weights as a pytree, applied to equal buffers, one expert's rows or
ragged groups."""

from __future__ import annotations

import operator
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

# Elementwise functions by name. The gated ones (arXiv 2002.05202) apply theirs to a second product,
# which multiplies the first.
ACTIVATIONS = {
  "gelu": jax.nn.gelu,
  "relu": jax.nn.relu,
  "reglu": jax.nn.relu,
  "geglu": jax.nn.gelu,
  "swiglu": jax.nn.silu,
}
_GATED = frozenset({"reglu", "geglu", "swiglu"})

# How a learned vector may change hidden units, and what it begins as: with no effect (ST-MoE,
# appendix C).
FFN_BIASES: Mapping[str, Any] = {
  "none": None,
  "additive": (operator.add, 0.0),
  "multiplicative": (operator.mul, 1.0),
}

# The logical axes of each weight (see `sharding.RULES`).
AXES: Mapping[str, tuple[str, ...]] = {
  "up": ("expert", "embed", "mlp"),
  "gate": ("expert", "embed", "mlp"),
  "down": ("expert", "mlp", "embed"),
  "hidden_bias": ("expert", "mlp"),
}


def is_gated(activation: str) -> bool:
  """Whether the FFN has a third matrix, whose product passes the nonlinearity and multiplies the
  other's."""
  return activation in _GATED


def activate(activation: str, pre: dict[str, Any]) -> Array:
  """Hidden units from pre-activations: f(up), or f(gate) * up for gated activations. GELU is the
  tanh form.

  Args:
    activation: a key of `ACTIVATIONS`.
    pre: {"up": [..., F]} and, for gated activations, {"gate": [..., F]}.
  """
  function = ACTIVATIONS[activation]
  return function(pre["gate"]) * pre["up"] if is_gated(activation) else function(pre["up"])


def add_bias(ffn_bias: str, hidden: Array, bias: Array | None) -> Array:
  """hidden + bias or hidden * bias: what comes between activation and output projection (ST-MoE,
  appendix C).

  Args:
    ffn_bias: a key of `FFN_BIASES`.
    hidden: [..., F].
    bias: [F], or of any shape that multiplies `hidden`; not read for "none".
  """
  return (
    hidden if ffn_bias == "none" else FFN_BIASES[ffn_bias][0](hidden, bias.astype(hidden.dtype))
  )


# JAX rebuilds pytrees with placeholder leaves, which no shape check survives.
@typing.no_type_check
@struct.dataclass
class Experts:
  """E feed-forward networks: down(f(up x)), or down(f(gate x) * up x) if gated; `hidden_bias` acts
  on what `down` gets.

  Weights are cast to the dtype of the rows they are applied to; their gradients come back in their
  own dtype. `gate` is present if and only if `is_gated(activation)`, `hidden_bias` if and only if
  `ffn_bias` is not "none".
  """

  up: Float[Array, "E D F"]
  down: Float[Array, "E F D"]
  gate: Float[Array, "E D F"] | None
  activation: str = struct.field(pytree_node=False)
  hidden_bias: Float[Array, "E F"] | None = None
  ffn_bias: str = struct.field(pytree_node=False, default="none")

  @property
  def num_experts(self) -> int:
    return self.up.shape[0]

  @property
  def weights(self) -> dict[str, Array]:
    """All weights, by name; every leaf has leading axis E."""
    gate = {"gate": self.gate} if is_gated(self.activation) else {}
    bias = {} if self.ffn_bias == "none" else {"hidden_bias": self.hidden_bias}
    return {"up": self.up, "down": self.down} | gate | bias

  @property
  def axes(self) -> Experts:
    """The same pytree with each weight's logical axes in its place."""
    return self.replace(**{name: AXES[name] for name in self.weights})

  def buffers(self, x: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
    """All experts on buffers of equal size: expert e on x[e]."""
    w = self.weights
    pre = {name: jnp.einsum("end,edf->enf", x, w[name].astype(x.dtype)) for name in _inward(w)}
    bias = None if self.hidden_bias is None else self.hidden_bias[:, None]
    return jnp.einsum("enf,efd->end", self._hidden_units(pre, bias), w["down"].astype(x.dtype))

  def hidden(self, w: dict[str, Any], rows: Float[Array, "N D"]) -> dict[str, Any]:
    """Pre-activations [N, F] of one expert, whose slice of `weights` is `w`: what a backward pass
    has to keep."""
    return {name: rows @ w[name].astype(rows.dtype) for name in _inward(w)}

  def output(self, w: dict[str, Any], pre: dict[str, Any]) -> Float[Array, "N D"]:
    """The rest of one expert, from the pre-activations that `hidden` returned."""
    return self._hidden_units(pre, w.get("hidden_bias")) @ w["down"].astype(pre["up"].dtype)

  def ragged(self, rows: Float[Array, "N D"], group_sizes: Int[Array, "E"]) -> Float[Array, "N D"]:
    """All experts on rows sorted by expert, `group_sizes[e]` for expert e, by `jax.lax.ragged_dot`.

    What rows after the last group become is undefined. A grouped kernel on GPU and TPU; XLA's CPU
    lowering multiplies every row with every expert (E times the FLOPs).
    """
    w = jax.tree.map(lambda leaf: leaf.astype(rows.dtype), self.weights)
    pre = {name: jax.lax.ragged_dot(rows, w[name], group_sizes) for name in _inward(w)}
    bias = (
      None
      if self.hidden_bias is None
      else jnp.repeat(w["hidden_bias"], group_sizes, axis=0, total_repeat_length=rows.shape[0])
    )
    return jax.lax.ragged_dot(self._hidden_units(pre, bias), w["down"], group_sizes)

  def _hidden_units(self, pre: dict[str, Any], bias: Array | None) -> Array:
    return add_bias(self.ffn_bias, activate(self.activation, pre), bias)


def _inward(weights: dict[str, Any]) -> list[str]:
  """The weights that make pre-activations, in the order of `weights`."""
  return [name for name in weights if name in ("up", "gate")]
