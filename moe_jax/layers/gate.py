"""The learned inputs of a router: its logits, and the other fields that some routers need.

They have the dtype of `x`, which the layer casts to `router_dtype`: float32 whatever the dtype of
the model, except in ST-MoE's ablation, which uses bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from moe_jax.errors import ConfigError
from moe_jax.layers.init import parameter, projection
from moe_jax.options import NOT_NEGATIVE, POSITIVE, PROBABILITY, OneOf, Options, option
from moe_jax.routing import RoutingPlan, replay


def linear(
  module: nn.Module, x: Float[Array, "G S D"], num_experts: int, scale: float
) -> Float[Array, "G S E"]:
  """Returns the logits x W of one matrix without bias."""
  return project(module, "router", x, num_experts, scale)


def tanh(
  module: nn.Module, x: Float[Array, "G S D"], num_experts: int, scale: float
) -> Float[Array, "G S E"]:
  """Returns the logits of two matrices W1 and W2 with a tanh between them (LLaMA-MoE).

  The logits are tanh(x W1) W2, with E hidden units and no biases.
  """
  hidden = jnp.tanh(project(module, "router_hidden", x, num_experts, 1.0))
  return project(module, "router", hidden, num_experts, scale, axis=None)


def product_keys(
  module: nn.Module, x: Float[Array, "G S D"], num_experts: int, scale: float
) -> Float[Array, "G S E"]:
  """Returns the logits of E = n^2 experts as sums of two of 2n numbers (Doge's CDMoE).

  With (a, b) = x W the logit of expert i n + j is a_i + b_j, so that the matrix has 2n columns.
  Product keys are those of Lample et al. 2019 (arXiv 1907.05242), with one query for both halves.

  Raises:
    ConfigError: E is no square.
  """
  check_square(num_experts)
  first, second = jnp.split(
    project(module, "router", x, 2 * math.isqrt(num_experts), scale), 2, axis=-1
  )
  return (first[..., :, None] + second[..., None, :]).reshape(*x.shape[:2], num_experts)


def check_square(num_experts: int) -> None:
  """Raises ConfigError unless the number of experts is a square, as product keys need it."""
  if math.isqrt(num_experts) ** 2 != num_experts:
    raise ConfigError(
      "model.moe.gate_network",
      "product_keys",
      f"needs a square number of experts, and {num_experts} is none; the nearest are "
      f"{math.isqrt(num_experts) ** 2} and {(math.isqrt(num_experts) + 1) ** 2}",
    )


# Name -> function from (module, x, E, scale of the initial weights) to logits.
NETWORKS = {"linear": linear, "tanh": tanh, "product_keys": product_keys}


@dataclasses.dataclass(frozen=True)
class GateOptions(Options):
  """The part of `model.moe` that says what the router sees and what its gates become."""

  gate_network: Annotated[str, OneOf(NETWORKS)] = option(
    "linear",
    "What makes the router's logits: one matrix, two with tanh between them (LLaMA-MoE), or sums "
    "of two halves of a product key, for a square number of experts (Doge).",
    neutral="linear",
  )
  router_init_scale: Annotated[float, NOT_NEGATIVE] = option(
    0.1,
    "Standard deviation of the router's first weights, times sqrt(fan_in); 0 starts from zeros.",
    neutral=0.1,
  )
  router_dtype: Literal["float32", "bfloat16"] = option(
    "float32",
    "Dtype of the logits, their input and their weights; the softmax is always float32. bfloat16 "
    "is for ST-MoE's ablation.",
    neutral="float32",
  )
  jitter: Annotated[float, PROBABILITY] = option(
    0.0, "What jitter_on names is multiplied by U[1 - jitter, 1 + jitter] in training.", neutral=0.0
  )
  jitter_on: Literal["input", "logits"] = option(
    "input",
    "The router's input (Switch, Mesh-TensorFlow) or its logits (the text of ST-MoE).",
    neutral="input",
  )
  routed_scale: Annotated[float, POSITIVE] = option(
    1.0, "Factor on all gates (LLaMA-MoE's N/k, DeepSeek-V2's 16, V3's 2.5).", neutral=1.0
  )
  router_norm: Literal["none", "rms"] = option(
    "none",
    "A norm with a learned scale on the router's copy of the input: none, or RMSNorm (Gemma 4).",
    neutral="none",
  )
  router_bias: bool = option(
    False,
    "Whether a learned bias of each expert, which starts at 0, is added to its logit (gpt-oss).",
    neutral=False,
  )
  logit_scale: Annotated[float, POSITIVE] = option(
    1.0, "Factor on the logits, after router_bias (Gemma 4's d_model**-0.5).", neutral=1.0
  )
  logit_softcap: Annotated[float, NOT_NEGATIVE] = option(
    0.0,
    "Logits x become c tanh(x / c) with this c, after logit_scale (Laguna); 0 leaves them.",
    neutral=0.0,
  )
  gate_residual: bool = option(
    False,
    "Whether the logits of the layer with experts before, times a learned matrix that starts at 0, "
    "are added to the router's (MoE++).",
    neutral=False,
  )
  expert_scale: bool = option(
    False,
    "Whether a learned factor of each expert, which starts at 1, multiplies its gates (Gemma 4).",
    neutral=False,
  )
  gate_on: Literal["output", "input"] = option(
    "output",
    "What gates multiply: the experts' outputs, or their inputs (Llama 4), for which each "
    "assignment holds its own copy of its token.",
    neutral="output",
  )
  replay_gate: Annotated[str, OneOf(replay.GATES)] = option(
    "stored",
    "How the gates of a stored plan are made when it is followed; see `routing/replay.py`.",
  )


def adjust(
  module: nn.Module, logits: Float[Array, "G S E"], options: GateOptions
) -> Float[Array, "G S E"]:
  """Returns the logits with their learned bias, factor and soft cap, in this order.

  Args:
    module: Owner of the parameter router_bias, if there is one.
    logits: What the router's network returned, in float32.
    options: The options `router_bias`, `logit_scale` and `logit_softcap` are read.
  """
  if options.router_bias:
    zeros = nn.initializers.zeros
    logits += parameter(module, "router_bias", zeros, logits.shape[-1:], ("router",))
  if options.logit_scale != 1.0:
    logits *= options.logit_scale
  if options.logit_softcap:
    logits = options.logit_softcap * jnp.tanh(logits / options.logit_softcap)
  return logits


def residual(
  module: nn.Module, logits: Float[Array, "G S E"], before: Float[Array, "G S E"] | None
) -> Float[Array, "G S E"]:
  """Returns the logits with those of the layer with experts before, times a matrix (MoE++).

  Args:
    module: Owner of the parameter router_residual.
    logits: What the router's network returned, in float32.
    before: Logits of the layer with experts before; None means that they are 0.
  """
  zeros, shape = nn.initializers.zeros, (logits.shape[-1],) * 2
  matrix = parameter(module, "router_residual", zeros, shape, (None, "router"))
  if before is None:
    return logits
  return logits + jnp.einsum("gse,ef->gsf", before, matrix, precision=jax.lax.Precision.HIGHEST)


def expert_scale(
  module: nn.Module, num_experts: int, options: GateOptions
) -> Float[Array, "E"] | None:
  """Returns the parameter router_gate_scale of `module`, or None without `expert_scale`."""
  if not options.expert_scale:
    return None
  return parameter(module, "router_gate_scale", nn.initializers.ones, (num_experts,), ("router",))


def scale_gates(plan: RoutingPlan, factor: float, scale: Float[Array, "E"] | None) -> RoutingPlan:
  """Returns the plan with the gates that the experts' outputs or inputs are multiplied by.

  Args:
    plan: The plan of the router, of one group or of several.
    factor: The factor on all gates.
    scale: The factor of each expert, or None.
  """
  gate = factor * plan.gate
  if scale is not None:
    # The index E of no expert is out of bounds; the gate there is 0 anyway.
    gate *= jnp.take(scale, plan.expert, mode="fill", fill_value=0.0)
  return dataclasses.replace(plan, gate=gate)


def learned(
  module: nn.Module,
  x: Float[Array, "G S D"],
  fields: Sequence[str],
  num_experts: int,
  groups: int,
  scale: float,
) -> dict[str, Float[Array, "..."]]:
  """Returns the fields of `RoutingContext` that a router needs and that the layer learns for it.

  Args:
    module: Owner of the parameters router_noise, router_primary, router_primary_noise and
      router_threshold, as far as they are needed.
    x: The router's input.
    fields: Names of the fields to make, as in `Router.learned`.
    num_experts: Number of experts E.
    groups: Number N of groups of experts, for hierarchical gating.
    scale: Scale of the router's initial weights. Noise weights and thresholds begin at zero
      (Shazeer 2017, appendix A).
  """

  def noise_std(name, width):
    return jax.nn.softplus(project(module, name, x, width, 0.0))

  make = {
    "noise_std": lambda: noise_std("router_noise", num_experts),
    "primary": lambda: project(module, "router_primary", x, groups, scale),
    "primary_noise_std": lambda: noise_std("router_primary_noise", groups),
    "threshold": lambda: parameter(
      module, "router_threshold", nn.initializers.zeros, (num_experts,), ("router",)
    ),
  }
  return {name: make[name]() for name in fields}


def project(
  module: nn.Module,
  name: str,
  x: Float[Array, "G S D"],
  width: int,
  scale: float,
  axis: str | None = "embed",
) -> Float[Array, "G S W"]:
  """Returns `x` times the parameter `name`, in the dtype of `x` and with the highest precision.

  Without the highest precision, accelerators would compute a float32 product with fewer bits, and
  tokens with nearly equal logits could be routed differently.

  Args:
    module: The module that owns the parameter.
    name: Name of the parameter.
    x: Input of G groups of S tokens.
    width: Number of output features W.
    scale: Factor on the standard deviation of the initial weights; 0 starts from zeros.
    axis: Logical name of the input axis.
  """
  weight = projection(
    module,
    name,
    (x.shape[-1], width),
    (axis, "router"),
    fan_in=x.shape[-1],
    scale=scale,
    dtype=x.dtype,
  )
  return jnp.einsum("gsd,de->gse", x, weight, precision=jax.lax.Precision.HIGHEST)
