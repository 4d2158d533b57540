"""The auxiliary losses of a layer: what `routing/` says of one group, over all groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from moe_jax.routing import RoutingContext, RoutingPlan, group_axes, losses
from moe_jax.routing.strictly_balanced import threshold_loss


def load_without_noise(logits: Float[Array, "S E"], context: RoutingContext, *, k: int = 1,
                       **_) -> Float[Array, ""]:
  """The smooth load about the logits as they are, with V-MoE's sigma of 1/E: for routers that add no noise."""
  return losses.load(logits, logits, context.valid, min(k, logits.shape[-1]), 1.0 / logits.shape[-1])


@dataclasses.dataclass(frozen=True)
class LossOptions:
  """Which losses a layer reports, and what they count.

  Attributes:
    names: keys of `LOSSES`.
    balance_counts: "top_1" or "all", see `losses.balance_terms`.
    balance_over: "group" or "global": over what f and P are averaged before they are multiplied.
    balance_scores: a key of `losses.SCORES`: what P averages.
    importance_of: "probs" (V-MoE) or "gates" (Shazeer).
    devices: D, groups of E/D consecutive experts, for the losses "device" and "communication".
    devices_a_token: M, to how many of them a token may be sent, for "communication".
    load: (logits [S, E], context) -> scalar: CV^2 of the router's smooth load.
    k: experts a token, for "threshold".
  """

  names: tuple[str, ...] = ()
  balance_counts: str = "top_1"
  balance_over: str = "group"
  balance_scores: str = "softmax"
  importance_of: str = "probs"
  devices: int = 1
  devices_a_token: int = 1
  load: Callable[[Array, RoutingContext], Array] = load_without_noise
  k: int = 1


def auxiliary_losses(options: LossOptions, logits: Float[Array, "G S E"], plan: RoutingPlan,
                     context: RoutingContext) -> dict[str, Float[Array, ""]]:
  """Each of `options.names`, unweighted.

  Args:
    options: of the layer.
    logits: as the router had them.
    plan: before capacity, [G, A] arrays.
    context: as the router had it; padding counts in no loss.
  """
  return {name: LOSSES[name](options, logits, plan, context) for name in options.names}


def _balance(o: LossOptions, logits, plan, context, devices: int | None = None):
  f, p = jax.vmap(lambda l, q, v: losses.balance_terms(l, q, v, o.balance_counts, o.balance_scores))(
      logits, plan, context.valid)
  if devices:
    f, p = (jax.vmap(lambda a: losses.by_device(a, devices))(a) for a in (f, p))
  return _multiply(o, f, p, context)


def _multiply(o: LossOptions, f, p, context):
  if o.balance_over == "global":
    return losses.balance(*(losses.over_groups(a, context.valid) for a in (f, p)))
  return losses.over_groups(jax.vmap(losses.balance)(f, p), context.valid)


def _communication(o: LossOptions, logits, plan, context):
  f, p = jax.vmap(lambda l, q, v: losses.communication_terms(l, q, v, o.devices, o.devices_a_token))(
      logits, plan, context.valid)
  return _multiply(o, f, p, context)


def _importance(o: LossOptions, logits, plan, context):
  values = (jax.vmap(losses.gate_importance)(plan) if o.importance_of == "gates"
            else jax.vmap(losses.importance)(logits, context.valid))
  return losses.over_groups(values, context.valid)


def _load(o: LossOptions, logits, plan, context):
  values = jax.vmap(o.load, in_axes=(0, group_axes(context)))(logits, context)
  return losses.over_groups(values, context.valid)


def _threshold(o: LossOptions, logits, plan, context):
  one = lambda l, v: threshold_loss(l, context.threshold, v, o.k)
  return losses.over_groups(jax.vmap(one)(logits, context.valid), context.valid)


# name -> f(options, logits [G, S, E], plan, context) -> scalar, unweighted.
LOSSES = {
    "balance": _balance,
    "device": lambda o, logits, plan, context: _balance(o, logits, plan, context, o.devices),
    "communication": _communication,
    "z": lambda o, logits, plan, context: losses.over_groups(
        jax.vmap(losses.z)(logits, context.valid), context.valid),
    "importance": _importance,
    "load": _load,
    "threshold": _threshold,
}
