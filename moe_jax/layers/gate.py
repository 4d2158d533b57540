"""What a router is given: logits, and whatever else a layer has to learn for it.

All of it has the dtype of x, which is float32, whatever the model's, but in ST-MoE's ablation of
that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from moe_jax.layers.init import projection
from moe_jax.options import NOT_NEGATIVE, POSITIVE, PROBABILITY, OneOf, Options, option
from moe_jax.routing import replay


def linear(
  module: nn.Module, x: Float[Array, "G S D"], num_experts: int, scale: float
) -> Float[Array, "G S E"]:
  """x W: one matrix, no bias."""
  return project(module, "router", x, num_experts, scale)


def tanh(
  module: nn.Module, x: Float[Array, "G S D"], num_experts: int, scale: float
) -> Float[Array, "G S E"]:
  """tanh(x W1) W2, with a hidden layer of E units and no biases (LLaMA-MoE)."""
  hidden = jnp.tanh(project(module, "router_hidden", x, num_experts, 1.0))
  return project(module, "router", hidden, num_experts, scale, axis=None)


NETWORKS = {"linear": linear, "tanh": tanh}


@dataclasses.dataclass(frozen=True)
class GateOptions(Options):
  """The part of `model.moe` that says what the router sees and what its gates become."""

  gate_network: Annotated[str, OneOf(NETWORKS)] = option(
    "linear",
    "What makes the router's logits: one matrix, or two with tanh between them (LLaMA-MoE).",
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
  replay_gate: Annotated[str, OneOf(replay.GATES)] = option(
    "stored",
    "How the gates of a stored plan are made when it is followed; see `routing/replay.py`.",
  )


def learned(
  module: nn.Module,
  x: Float[Array, "G S D"],
  fields: Sequence[str],
  num_experts: int,
  groups: int,
  scale: float,
) -> dict[str, Float[Array, "..."]]:
  """The fields of `RoutingContext` that a `Router` names as learned.

  Args:
    module: owner of the parameters router_noise, router_primary, router_primary_noise and
      router_threshold.
    x: the router's input.
    fields: which fields to make.
    num_experts: E.
    groups: N, of experts (hierarchical gating).
    scale: of the initial router; noise weights and thresholds begin at zero (Shazeer 2017, appendix
      A).
  """

  def std(name, width):
    return jax.nn.softplus(project(module, name, x, width, 0.0))

  make = {
    "noise_std": lambda: std("router_noise", num_experts),
    "primary": lambda: project(module, "router_primary", x, groups, scale),
    "primary_noise_std": lambda: std("router_primary_noise", groups),
    "threshold": lambda: module.param(
      "router_threshold",
      nn.with_logical_partitioning(nn.initializers.zeros, ("router",)),
      (num_experts,),
      jnp.float32,
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
  """x times parameter `name`, in x's dtype to the last bit of the hardware's ability. `axis`: the
  logical one of D."""
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
