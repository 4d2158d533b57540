"""Zero-computation experts, which the router chooses like others but which have no FFN.

A layer with E experts that have an FFN has Z more, in this order: zero experts, copy experts and
constant experts. The router gets logits for all E + Z, of which the first E are for FFNs. An
assignment to one of the Z costs neither an FFN nor one of its slots, so that tokens that choose
equally many experts cost different amounts. Shapes are static, so the arrays of dropless
dispatchers still have room for an FFN at each choice of every token.

Papers: MoE++ (Jin et al. 2024, arXiv 2410.07348) has all three kinds, LongCat-Flash (arXiv
2509.01322) has copy experts only and calls them identity experts.

    zero:      y = 0
    copy:      y = x
    constant:  y = a1 x + a2 v,  (a1, a2) = softmax(x W), where W [D, 2] and v [D] are learned

MoE++ also adds a map of the previous layer's logits to those of a layer, which is the option
`gate_residual`. Deviations from MoE++: its two capacities are left out, which are given here from
memory: of gamma * T slots, an FFN expert has the share tau / (tau E + Z), and a zero-computation
expert 1 / (tau E + Z). In this package the capacity is that of FFN experts, it depends neither on Z
nor on tau, and a zero-computation expert takes every token that chooses it. The published code for
inference sets the gate of the zero expert to 0 before it normalises the gates of a token. Here the
gates are those of the router, so that with the norm over the chosen experts the zero expert keeps
its share.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Shaped

from moe_jax.layers.init import parameter, projection
from moe_jax.options import EXPERTS, NOT_NEGATIVE, Options, option
from moe_jax.routing import RoutingPlan

# The options that count experts without an FFN, in the order of their indices.
WITHOUT_FFN = ("zero_experts", "copy_experts", "constant_experts")


@dataclasses.dataclass(frozen=True)
class ZeroOptions(Options):
  """The part of the section `model.moe` that names experts without an FFN."""

  zero_experts: Annotated[int, EXPERTS] = option(
    0, "Experts without an FFN whose output is 0, beside num_experts (MoE++).", neutral=0
  )
  copy_experts: Annotated[int, EXPERTS] = option(
    0,
    "Experts without an FFN whose output is their input, beside num_experts (MoE++; the identity "
    "experts of LongCat-Flash).",
    neutral=0,
  )
  constant_experts: Annotated[int, EXPERTS] = option(
    0,
    "Experts without an FFN that mix their input with a learned vector, beside num_experts "
    "(MoE++).",
    neutral=0,
  )
  zero_tau: Annotated[float, NOT_NEGATIVE] = option(
    1.0,
    "Factor on the terms of experts without an FFN in the balance loss; below 1 they get more "
    "tokens (MoE++: 0.75).",
    neutral=1.0,
  )

  @property
  def count(self) -> int:
    """The number Z of zero-computation experts."""
    return sum(getattr(self, name) for name in WITHOUT_FFN)

  def eta(self, num_experts: int) -> tuple[float, ...] | None:
    """Returns eta_i of the balance loss (E + Z) * sum_i eta_i f_i P_i for each expert.

    It is 1 for the first E = `num_experts` and `zero_tau` for the others. None means that all are
    1. The loss is MoE++'s heterogeneous load balance loss; with eta_i = 1 it is 1 at balance.
    """
    if not self.count or self.zero_tau == 1.0:
      return None
    return (1.0,) * num_experts + (self.zero_tau,) * self.count


class Constants(struct.PyTreeNode):
  """The parameters of J constant experts.

  Attributes:
    mix: The matrices W of all experts, side by side.
    vectors: The vector v of each expert.
  """

  mix: Float[Array, "D twoJ"]
  vectors: Float[Array, "J D"]


def constants(module: nn.Module, options: ZeroOptions, width: int) -> Constants | None:
  """Returns the parameters constant_mix and constant_vectors of `module`, or None without any.

  The vectors begin with unit variance, as in MoE++'s code, which is that of a normalised input.

  Args:
    module: The layer that owns the parameters.
    options: The options of zero-computation experts.
    width: The width D of the tokens.
  """
  count = options.constant_experts
  if not count:
    return None
  # The axis "router" is never split, and counts these weights as part of the router's.
  return Constants(
    mix=projection(module, "constant_mix", (width, 2 * count), ("embed", "router"), fan_in=width),
    vectors=parameter(
      module, "constant_vectors", nn.initializers.normal(1.0), (count, width), ("router", "embed")
    ),
  )


def ffn_part(plan: RoutingPlan, num_experts: int) -> RoutingPlan:
  """Returns the plan for dispatchers, in which zero-computation experts are no expert.

  Args:
    plan: A plan over E + Z experts, of one group or of several.
    num_experts: The number E of experts with an FFN.
  """
  has_ffn = plan.expert < num_experts
  return RoutingPlan(
    token=plan.token,
    expert=jnp.where(has_ffn, plan.expert, num_experts),
    gate=jnp.where(has_ffn, plan.gate, 0.0),
    num_experts=num_experts,
  )


def with_kept(plan: RoutingPlan, kept: RoutingPlan) -> RoutingPlan:
  """Returns the plan without what `kept` dropped; zero-computation experts drop nothing.

  Args:
    plan: A plan over E + Z experts.
    kept: Its `ffn_part` after capacity was applied, in the same order.
  """
  stays = (plan.expert >= kept.num_experts) | (kept.expert < kept.num_experts)
  return dataclasses.replace(
    plan,
    expert=jnp.where(stays, plan.expert, plan.num_experts),
    gate=jnp.where(stays, plan.gate, 0.0),
  )


def outputs(
  plan: RoutingPlan, x: Float[Array, "G S D"], options: ZeroOptions, weights: Constants | None
) -> Float[Array, "G S D"]:
  """Returns the sum of gate * output over each token's zero-computation experts.

  Gates and sums are float32, and the result has the dtype of `x`.

  Args:
    plan: The plan of each group over E + Z experts, with the gates to multiply by.
    x: The tokens of each group.
    options: The options of zero-computation experts.
    weights: The parameters of the constant experts.
  """
  # The first copy expert. Zero experts are before it, and contribute nothing.
  copies = plan.num_experts - options.copy_experts - options.constant_experts
  first_constant = plan.num_experts - options.constant_experts

  def copied(plan):
    is_copy = (plan.expert >= copies) & (plan.expert < first_constant)
    gate = jnp.where(is_copy, plan.gate, 0.0)
    return jnp.zeros(x.shape[1], jnp.float32).at[plan.token].add(gate)

  factor = jax.vmap(copied)(plan)  # what x is multiplied by, [G, S]
  if weights is None:
    return (factor[..., None] * x).astype(x.dtype)

  def by_constant(plan):
    # Negative indices would count from the end; index J is out of bounds and dropped.
    is_constant = plan.expert >= first_constant
    index = jnp.where(is_constant, plan.expert - first_constant, options.constant_experts)
    gates = jnp.zeros((x.shape[1], options.constant_experts), jnp.float32)
    return gates.at[plan.token, index].add(plan.gate, mode="drop")

  gates = jax.vmap(by_constant)(plan)  # [G, S, J]
  scores = jnp.einsum("gsd,dc->gsc", x, weights.mix.astype(x.dtype)).astype(jnp.float32)
  a = jax.nn.softmax(scores.reshape(*gates.shape, 2), axis=-1)  # [G, S, J, 2]
  factor += jnp.sum(gates * a[..., 0], axis=-1)
  added = jnp.einsum("gsj,jd->gsd", gates * a[..., 1], weights.vectors)
  return (factor[..., None] * x + added).astype(x.dtype)


def sums(plan: RoutingPlan, num_experts: int) -> dict[str, Shaped[Array, "..."]]:
  """Returns what `routing.metrics.finish` must know about zero-computation experts besides.

  Args:
    plan: The plan that the router returned, over E + Z experts.
    num_experts: The number E of experts with an FFN.

  Returns:
    "free": the number of assignments to zero-computation experts, int32.
  """
  is_free = (plan.expert >= num_experts) & (plan.expert < plan.num_experts)
  return {"free": jnp.sum(is_free, dtype=jnp.int32)}
