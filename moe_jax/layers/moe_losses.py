"""The auxiliary losses of a layer: what `routing/` says of one group, over all groups."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import jax
from jaxtyping import Array, Float

from moe_jax.options import COUNT_OF_EXPERTS, NOT_NEGATIVE, OneOf, Options, option
from moe_jax.routing import RoutingContext, RoutingPlan, group_axes, losses
from moe_jax.routing.strictly_balanced import threshold_loss


def load_without_noise(
  logits: Float[Array, "S E"], context: RoutingContext, *, k: int = 1, **_
) -> Float[Array, ""]:
  """The smooth load about the logits as they are, with V-MoE's sigma of 1/E: for routers that add
  no noise."""
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
    "softmax", "What P averages: softmax, or sigmoid (DeepSeek-V3).", neutral="softmax"
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

  @property
  def weights(self) -> dict[str, float]:
    """The weight of each loss whose weight is not 0; the names are keys of `LOSSES`."""
    return {name: weight for name in LOSSES if (weight := getattr(self, f"{name}_loss"))}


@dataclasses.dataclass(frozen=True)
class RouterFacts:
  """What some losses must know about the router.

  Attributes:
    k: K, assignments of a token; for "threshold".
    devices_a_token: M, how many groups of experts a token may be sent to; for "communication".
    load: (logits [S, E], context) -> CV^2 of the router's smooth load; for "load".
  """

  k: int = 1
  devices_a_token: int = 1
  load: Callable[[Array, RoutingContext], Array] = load_without_noise


def auxiliary_losses(
  options: LossOptions,
  router: RouterFacts,
  logits: Float[Array, "G S E"],
  plan: RoutingPlan,
  context: RoutingContext,
  tokens: Float[Array, ""] | None = None,
  shares: Mapping[str, Array] | None = None,
) -> dict[str, Float[Array, ""]]:
  """Each of the losses that have a weight, unweighted.

  Args:
    options: of the layer.
    router: of the layer.
    logits: as the router had them.
    plan: before capacity, [G, A] arrays.
    context: as the router had it; padding counts in no loss.
    tokens: of a microbatch, see `losses.over_groups`; each loss is then its part of the batch's.
    shares: f of the whole batch, of losses that multiply f and P of the whole batch, by name; those
      that are not named take f of these groups. Because f has no gradient, D * sum_i f_i P_i of a
      microbatch's P is its part of the loss, and the parts' gradients add up to the gradient of the
      whole.
  """

  def mean(values):
    return losses.over_groups(values, context.valid, tokens)

  found = {}
  for name in options.weights:
    if _is_global(options, name):
      f, p = (mean(terms) for terms in TERMS[name](options, router, logits, plan, context))
      found[name] = losses.balance((shares or {}).get(name, f), p)
    else:
      found[name] = mean(LOSSES[name](options, router, logits, plan, context))
  return found


def global_shares(
  options: LossOptions,
  router: RouterFacts,
  logits: Float[Array, "G S E"],
  plan: RoutingPlan,
  context: RoutingContext,
  tokens: Float[Array, ""] | None = None,
) -> dict[str, Float[Array, "..."]]:
  """f, [E] or [D], of each loss that multiplies f and P of the whole batch; arguments as of
  `auxiliary_losses`."""
  return {
    name: losses.over_groups(
      TERMS[name](options, router, logits, plan, context)[0], context.valid, tokens
    )
    for name in options.weights
    if _is_global(options, name)
  }


def _is_global(options: LossOptions, name: str) -> bool:
  return name in TERMS and options.balance_over == "global"


def _balance(o: LossOptions, r: RouterFacts, logits, plan, context):
  return jax.vmap(
    lambda l, q, v: losses.balance_terms(l, q, v, o.balance_counts, o.balance_scores)
  )(logits, plan, context.valid)


def _device(o: LossOptions, r: RouterFacts, logits, plan, context):
  by_device = jax.vmap(lambda a: losses.by_device(a, o.devices))
  f, p = _balance(o, r, logits, plan, context)
  return by_device(f), by_device(p)


def _communication(o: LossOptions, r: RouterFacts, logits, plan, context):
  return jax.vmap(
    lambda l, q, v: losses.communication_terms(l, q, v, o.devices, r.devices_a_token)
  )(logits, plan, context.valid)


# name -> f(options, router, logits [G, S, E], plan, context) -> (f, P) of each group; [G, E] or
# [G, D].
TERMS = {"balance": _balance, "device": _device, "communication": _communication}


def _product(name: str, o: LossOptions, r: RouterFacts, logits, plan, context):
  return jax.vmap(losses.balance)(*TERMS[name](o, r, logits, plan, context))


def _z(o: LossOptions, r: RouterFacts, logits, plan, context):
  return jax.vmap(losses.z)(logits, context.valid)


def _importance(o: LossOptions, r: RouterFacts, logits, plan, context):
  return (
    jax.vmap(losses.gate_importance)(plan)
    if o.importance_of == "gates"
    else jax.vmap(losses.importance)(logits, context.valid)
  )


def _load(o: LossOptions, r: RouterFacts, logits, plan, context):
  return jax.vmap(r.load, in_axes=(0, group_axes(context)))(logits, context)


def _threshold(o: LossOptions, r: RouterFacts, logits, plan, context):
  return jax.vmap(lambda l, v: threshold_loss(l, context.threshold, v, r.k))(logits, context.valid)


# name -> f(options, router, logits [G, S, E], plan, context) -> [G], of each group, unweighted.
LOSSES = {
  **{name: functools.partial(_product, name) for name in TERMS},
  "z": _z,
  "importance": _importance,
  "load": _load,
  "threshold": _threshold,
}
