"""Feed-forward experts, whose weights are a pytree.

They can be applied to buffers of equal size, to the rows of one expert or to ragged groups.
"""

from __future__ import annotations

import operator
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.expert_function import HIDDEN, named

# gpt-oss's limit of pre-activations, and the factor with which a sigmoid approximates GELU.
_LIMIT, _ALPHA = 7.0, 1.702


def clamped_swish(gate: Array) -> Array:
  """Returns x sigmoid(1.702 x) of x = min(gate, 7) (gpt-oss)."""
  gate = jnp.minimum(gate, _LIMIT)
  return gate * jax.nn.sigmoid(_ALPHA * gate)


# Elementwise functions by name. The gated ones (arXiv 2002.05202) are applied to the product with a
# second matrix, and the result multiplies the product with the first.
ACTIVATIONS = {
  "gelu": jax.nn.gelu,
  "relu": jax.nn.relu,
  "reglu": jax.nn.relu,
  "geglu": jax.nn.gelu,
  "swiglu": jax.nn.silu,
  "clamped_swiglu": clamped_swish,
}
_GATED = frozenset({"reglu", "geglu", "swiglu", "clamped_swiglu"})

# The operations by which a learned vector may change hidden units, and the initial value of the
# vector, with which it has no effect (ST-MoE, appendix C).
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
  "up_bias": ("expert", "mlp"),
  "gate_bias": ("expert", "mlp"),
  "down_bias": ("expert", "embed"),
}


def is_gated(activation: str) -> bool:
  """Returns whether the FFN is gated.

  A gated FFN has a third matrix. The nonlinearity is applied to the product with this matrix, and
  the result multiplies the product with the first matrix.
  """
  return activation in _GATED


def activate(activation: str, pre: dict[str, Any]) -> Array:
  """Returns the hidden units, f(up), or f(gate) * up for gated activations.

  GELU is computed in its tanh form. For "clamped_swiglu", up is clipped to [-7, 7] and 1 is added
  (gpt-oss).

  Args:
    activation: A key of `ACTIVATIONS`.
    pre: The pre-activations, {"up": [..., F]} and, for gated activations, also {"gate": [..., F]}.
  """
  function, up = ACTIVATIONS[activation], pre["up"]
  if activation == "clamped_swiglu":
    up = jnp.clip(up, -_LIMIT, _LIMIT) + 1
  return function(pre["gate"]) * up if is_gated(activation) else function(up)


def add_bias(ffn_bias: str, hidden: Array, bias: Array | None) -> Array:
  """Returns hidden + bias, hidden * bias or hidden, depending on `ffn_bias`.

  The operation comes between the activation and the output projection (ST-MoE, appendix C).

  Args:
    ffn_bias: A key of `FFN_BIASES`.
    hidden: The hidden units, [..., F].
    bias: A vector of shape [F], or an array that broadcasts with `hidden`. It is not read for
      "none".

  Raises:
    ValueError: If the bias is None although `ffn_bias` needs one.
  """
  if ffn_bias == "none":
    return hidden
  if bias is None:
    raise ValueError(f"ffn_bias {ffn_bias!r} needs a bias")
  return FFN_BIASES[ffn_bias][0](hidden, bias.astype(hidden.dtype))


# JAX rebuilds pytrees with placeholder leaves that are not arrays, so the checks of shapes at run
# time are switched off for this class.
@typing.no_type_check
class Experts(struct.PyTreeNode):
  """E feed-forward networks, down(f(up x)), or down(f(gate x) * up x) if they are gated.

  Weights are cast to the dtype of the rows that they are applied to. Their gradients have the dtype
  of the weights.

  Attributes:
    up: The input matrices.
    down: The output matrices.
    gate: The matrices of the gates. They are present if and only if `is_gated(activation)`.
    activation: A key of `ACTIVATIONS`.
    hidden_bias: A vector per expert that is added to or multiplied with the hidden units before
      `down`. It is present if and only if `ffn_bias` is not "none".
    ffn_bias: A key of `FFN_BIASES`, the operation of `hidden_bias`.
    up_bias: A vector per expert that is added to the product with `up` (gpt-oss). None means that
      there is none, as with the next two.
    gate_bias: What is added to the product with `gate`.
    down_bias: What is added to the product with `down`, so that the gate of the router multiplies
      it, too.
  """

  up: Float[Array, "E D F"]
  down: Float[Array, "E F D"]
  gate: Float[Array, "E D F"] | None
  activation: str = struct.field(pytree_node=False)
  hidden_bias: Float[Array, "E F"] | None = None
  ffn_bias: str = struct.field(pytree_node=False, default="none")
  up_bias: Float[Array, "E F"] | None = None
  gate_bias: Float[Array, "E F"] | None = None
  down_bias: Float[Array, "E D"] | None = None

  @property
  def num_experts(self) -> int:
    """The number of experts, E."""
    return self.up.shape[0]

  @property
  def weights(self) -> dict[str, Any]:
    """All weights by name. Every leaf has a leading axis E."""
    gate = {"gate": self.gate} if is_gated(self.activation) else {}
    bias = {} if self.ffn_bias == "none" else {"hidden_bias": self.hidden_bias}
    added = {name: getattr(self, name) for name in ("up_bias", "gate_bias", "down_bias")}
    added = {name: leaf for name, leaf in added.items() if leaf is not None}
    return {"up": self.up, "down": self.down} | gate | bias | added

  @property
  def axes(self) -> Experts:
    """This pytree with the logical axes of each weight in its place."""
    return self.replace(**{name: AXES[name] for name in self.weights})

  def buffers(self, x: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
    """Applies expert e to the rows x[e], which are buffers of equal size."""
    w = self.weights
    biases = {name: leaf[:, None] for name, leaf in w.items() if name.endswith("_bias")}

    def product(rows, name):
      y = jnp.einsum("enx,exy->eny", rows, w[name].astype(x.dtype))
      return _plus(y, biases.get(f"{name}_bias"))

    pre = named({name: product(x, name) for name in _inward(w)}, HIDDEN)
    return product(self._hidden_units(pre, biases.get("hidden_bias")), "down")

  def hidden(self, w: dict[str, Any], rows: Float[Array, "N D"]) -> dict[str, Any]:
    """Returns the pre-activations [N, F] of one expert, which a backward pass must keep.

    Args:
      w: The slice of `weights` of the expert.
      rows: The inputs of the expert.
    """
    return {
      name: _plus(rows @ w[name].astype(rows.dtype), w.get(f"{name}_bias")) for name in _inward(w)
    }

  def output(self, w: dict[str, Any], pre: dict[str, Any]) -> Float[Array, "N D"]:
    """Returns the output of one expert, given the pre-activations that `hidden` returned.

    Args:
      w: The slice of `weights` of the expert.
      pre: The pre-activations.
    """
    y = self._hidden_units(pre, w.get("hidden_bias")) @ w["down"].astype(pre["up"].dtype)
    return _plus(y, w.get("down_bias"))

  def ragged(
    self,
    rows: Float[Array, "N D"],
    group_sizes: Int[Array, "E"],
    matmul: Callable[[Array, Array, Array], Array] = jax.lax.ragged_dot,
  ) -> Float[Array, "N D"]:
    """Applies the experts to rows that are sorted by expert.

    Args:
      rows: The rows, sorted by expert. The results for rows after the last group are undefined.
      group_sizes: The number of rows of each expert.
      matmul: The grouped product (rows, matrices [E, ...], group_sizes) -> rows. The default is a
        kernel on TPUs; XLA's lowerings for CPUs and GPUs multiply every row with every expert,
        which takes E times the FLOPs.
    """
    w = jax.tree.map(lambda leaf: leaf.astype(rows.dtype), self.weights)

    def of_rows(name):
      if name not in w:
        return None
      bias = jnp.repeat(w[name], group_sizes, axis=0, total_repeat_length=rows.shape[0])
      # `jnp.repeat` gives the rows after the last group the last bias, whose gradient must not see
      # them, because they are undefined.
      is_used = jnp.arange(rows.shape[0]) < jnp.sum(group_sizes)
      return jnp.where(is_used[:, None], bias, 0)

    def product(rows, name):
      return _plus(matmul(rows, w[name], group_sizes), of_rows(f"{name}_bias"))

    pre = named({name: product(rows, name) for name in _inward(w)}, HIDDEN)
    return product(self._hidden_units(pre, of_rows("hidden_bias")), "down")

  def _hidden_units(self, pre: dict[str, Any], bias: Array | None) -> Array:
    """Returns the inputs of `down`, given pre-activations and a bias of matching shape."""
    return add_bias(self.ffn_bias, activate(self.activation, pre), bias)


def _plus(y: Array, bias: Array | None) -> Array:
  """Returns y, plus a bias in its dtype if there is one."""
  return y if bias is None else y + bias.astype(y.dtype)


def _inward(weights: dict[str, Any]) -> list[str]:
  """Returns the names of the weights that produce pre-activations, in the order of `weights`."""
  return [name for name in weights if name in ("up", "gate")]
