"""The auxiliary losses of a layer: the losses of `routing/` for one group, over all groups."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.options import COUNT_OF_EXPERTS, NOT_NEGATIVE, OneOf, Options, option
from moe_jax.routing import RoutingContext, RoutingPlan, group_axes, losses, metrics
from moe_jax.routing.strictly_balanced import threshold_loss


def load_without_noise(
  logits: Float[Array, "S E"], context: RoutingContext, *, k: int = 1, **_
) -> Float[Array, ""]:
  """Returns CV^2 of the smooth load for routers without noise, with V-MoE's sigma of 1/E."""
  return losses.load(
    logits, logits, context.valid, min(k, logits.shape[-1]), 1.0 / logits.shape[-1]
  )


@dataclasses.dataclass(frozen=True)
class LossOptions(Options):
  """The part of the section `model.moe` that names the auxiliary losses and what they count.

  With its own weight of 1, each loss is 1 at perfect balance (CV^2 is 0).
  """

  balance_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.01, "Weight of the balance loss E * sum_i f_i P_i.", neutral=0.0
  )
  balance_counts: Literal["top_1", "all"] = option(
    "top_1",
    "What f of the balance loss counts: first choices (top_1) or all assignments (all).",
    neutral="all",
  )
  balance_over: Literal["group", "global"] = option(
    "group",
    "Over what f and P are averaged before they are multiplied; global is the whole batch of an "
    "update, over all devices and microbatches (arXiv 2501.11873), and with train.accumulate_steps "
    "> 1 costs up to one more forward pass.",
    neutral="group",
  )
  balance_scores: Annotated[str, OneOf(losses.SCORES)] = option(
    "softmax",
    "What P averages: softmax, or shares of sigmoid (DeepSeek-V3) or sqrt_softplus (DeepSeek-V4).",
    neutral="softmax",
  )
  z_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.001, "Weight of the router z-loss (ST-MoE).", neutral=0.0
  )
  importance_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Weight of CV^2 of the experts' importance (Shazeer 2017).", neutral=0.0
  )
  importance_of: Literal["probs", "gates"] = option(
    "probs", "What importance sums: probabilities (V-MoE) or gates (Shazeer 2017).", neutral="probs"
  )
  load_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Weight of CV^2 of the router's smooth load (Shazeer 2017, appendix A).", neutral=0.0
  )
  device_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Weight of the balance between groups of experts (DeepSeekMoE); see devices.", neutral=0.0
  )
  communication_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Weight of the balance of what is sent to those groups (DeepSeek-V2).", neutral=0.0
  )
  devices: Annotated[int, COUNT_OF_EXPERTS] = option(
    1, "D, groups of num_experts / D consecutive experts; divides num_experts.", neutral=1
  )
  threshold_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Weight of what trains the thresholds of the router strictly_balanced.", neutral=0.0
  )
  sparsity_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.0,
    "First weight of the L1 loss of the router relu (ReMoE), which the rule sparsity adapts.",
    neutral=0.0,
  )
  entropy_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Weight of the mean entropy of the router's probabilities (top-p routing).", neutral=0.0
  )
  simbal_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.0,
    "Weight of the distance of the router's matrix from one with orthonormal columns (SimBal).",
    neutral=0.0,
  )

  @property
  def weights(self) -> dict[str, float]:
    """The weight of each loss whose weight is not 0, by the loss's key in `LOSSES`."""
    return {name: weight for name in LOSSES if (weight := getattr(self, f"{name}_loss"))}

  def total(self, losses: Mapping[str, Float[Array, ""]]) -> Float[Array, ""]:
    """Returns the weighted sum of a layer's losses, `Aux.losses`; it is 0 at initialisation."""
    return sum((self.weights[name] * loss for name, loss in losses.items()), jnp.float32(0))


@dataclasses.dataclass(frozen=True)
class RouterFacts:
  """What some losses must know about the router.

  Attributes:
    k: Number K of assignments per token, which "threshold" needs.
    devices_a_token: Number M of groups of experts that a token may be sent to, which
      "communication" needs.
    load: (logits [S, E], context) -> CV^2 of the router's smooth load, which is the loss "load".
    matrix: The last matrix R of the router's network, [D, E], which "simbal" needs.
    eta: Factor on each expert's term of the balance loss, [E]; see `zero_experts.py`. None means
      that all are 1.
  """

  k: int = 1
  devices_a_token: int = 1
  load: Callable[[Array, RoutingContext], Array] = load_without_noise
  matrix: Float[Array, "D E"] | None = None
  eta: tuple[float, ...] | None = None


def auxiliary_losses(
  options: LossOptions,
  router: RouterFacts,
  logits: Float[Array, "G S E"],
  plan: RoutingPlan,
  context: RoutingContext,
  tokens: Float[Array, ""] | None = None,
  shares: Mapping[str, Array] | None = None,
) -> dict[str, Float[Array, ""]]:
  """Returns the losses whose weight is not 0, each of them unweighted.

  Args:
    options: The loss options of the layer.
    router: Facts about the layer's router.
    logits: The router's logits.
    plan: The plan before capacity is applied, with [G, A] arrays.
    context: The router's context. Padding counts in no loss.
    tokens: Number of real tokens in all microbatches of the batch, if the groups are those of one
      microbatch (see `losses.over_groups`). Each loss is then the microbatch's part of the batch's
      loss. None means that the groups are the whole batch.
    shares: Name -> f of the whole batch, for losses that multiply f and P of the whole batch. A
      loss that is not named takes f of these groups. Because f has no gradient, D * sum_i f_i P_i
      with the P of a microbatch is its part of the loss, and the gradients of the parts add up to
      the gradient of the whole.
  """

  def mean(values):
    return losses.over_groups(values, context.valid, tokens)

  unweighted = {}
  for name in options.weights:
    if _is_global(options, name):
      f, p = (mean(terms) for terms in TERMS[name](options, router, logits, plan, context))
      unweighted[name] = losses.balance((shares or {}).get(name, f), p)
    else:
      unweighted[name] = mean(LOSSES[name](options, router, logits, plan, context))
  return unweighted


def global_shares(
  options: LossOptions,
  router: RouterFacts,
  logits: Float[Array, "G S E"],
  plan: RoutingPlan,
  context: RoutingContext,
  tokens: Float[Array, ""] | None = None,
) -> dict[str, Float[Array, "..."]]:
  """Returns f, [E] or [D], of each loss that multiplies f and P of the whole batch.

  Args:
    options: See `auxiliary_losses`, also for the other arguments.
    router: Facts about the layer's router.
    logits: The router's logits.
    plan: The plan before capacity is applied.
    context: The router's context.
    tokens: Number of real tokens in all microbatches of the batch, or None.
  """
  return {
    name: losses.over_groups(
      TERMS[name](options, router, logits, plan, context)[0], context.valid, tokens
    )
    for name in options.weights
    if _is_global(options, name)
  }


def _is_global(options: LossOptions, name: str) -> bool:
  """Returns whether this loss averages f and P over the whole batch before it multiplies them."""
  return name in TERMS and options.balance_over == "global"


def _balance(options: LossOptions, router: RouterFacts, logits, plan, context):
  """Returns f and P of the balance loss, each [G, E]; P is multiplied by `router.eta`."""
  f, p = jax.vmap(
    lambda logits, plan, valid: losses.balance_terms(
      logits, plan, valid, options.balance_counts, options.balance_scores
    )
  )(logits, plan, context.valid)
  return f, p if router.eta is None else p * jnp.asarray(router.eta)


def _device(options: LossOptions, router: RouterFacts, logits, plan, context):
  """Returns f and P of the balance loss between groups of experts, each [G, D]."""
  by_device = jax.vmap(lambda values: losses.by_device(values, options.devices))
  f, p = _balance(options, router, logits, plan, context)
  return by_device(f), by_device(p)


def _communication(options: LossOptions, router: RouterFacts, logits, plan, context):
  """Returns f and P of the communication loss, each [G, D]."""
  return jax.vmap(
    lambda logits, plan, valid: losses.communication_terms(
      logits, plan, valid, options.devices, router.devices_a_token
    )
  )(logits, plan, context.valid)


def _sparsity(options: LossOptions, router: RouterFacts, logits, plan, context):
  """Returns f and P of ReMoE's loss, each [G, E]; P is multiplied by what the rule has reached."""
  f, p = jax.vmap(
    lambda plan, valid: losses.sparsity_terms(plan, valid, logits.shape[1], router.k)
  )(plan, context.valid)
  return f, p if context.bias is None else p * jnp.exp(jnp.mean(context.bias))


# The losses that `balance_over` applies to, as functions (options, router, logits [G, S, E], plan,
# context) -> (f, P) of each group, which are [G, E] or [G, D].
TERMS = {
  "balance": _balance,
  "device": _device,
  "communication": _communication,
  "sparsity": _sparsity,
}


def _product(name: str, options: LossOptions, router: RouterFacts, logits, plan, context):
  """Returns the loss of each group for `balance_over` = "group"."""
  return jax.vmap(losses.balance)(*TERMS[name](options, router, logits, plan, context))


def _z(options: LossOptions, router: RouterFacts, logits, plan, context):
  return jax.vmap(losses.z)(logits, context.valid)


def _importance(options: LossOptions, router: RouterFacts, logits, plan, context):
  return (
    jax.vmap(losses.gate_importance)(plan)
    if options.importance_of == "gates"
    else jax.vmap(losses.importance)(logits, context.valid)
  )


def _load(options: LossOptions, router: RouterFacts, logits, plan, context):
  return jax.vmap(router.load, in_axes=(0, group_axes(context)))(logits, context)


def _entropy(options: LossOptions, router: RouterFacts, logits, plan, context):
  return jax.vmap(metrics.entropy)(logits, context.valid)


def _simbal(options: LossOptions, router: RouterFacts, logits, plan, context):
  if router.matrix is None:
    raise ValueError("the loss simbal needs RouterFacts.matrix, which is None")
  # All groups have the same loss, so that parts of a batch have their tokens' share of it.
  return jnp.full(logits.shape[0], losses.similarity(router.matrix))


def _threshold(options: LossOptions, router: RouterFacts, logits, plan, context):
  return jax.vmap(lambda logits, valid: threshold_loss(logits, context.threshold, valid, router.k))(
    logits, context.valid
  )


# All losses, as functions (options, router, logits [G, S, E], plan, context) -> [G], the unweighted
# loss of each group.
LOSSES = {
  **{name: functools.partial(_product, name) for name in TERMS},
  "z": _z,
  "importance": _importance,
  "load": _load,
  "threshold": _threshold,
  "entropy": _entropy,
  "simbal": _simbal,
}
