"""The auxiliary losses of a layer: what `routing/` says of one group, over all groups."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array, Float

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
class LossOptions:
  """Which losses a layer reports, and what they count.

  Attributes:
    names: keys of `LOSSES`.
    balance_counts: "top_1" or "all", see `losses.balance_terms`.
    balance_over: "group" or "global": over what f and P are averaged before they are multiplied.
      "global" is the whole batch of an update (arXiv 2501.11873), over all devices and
      microbatches; see `training.accumulate` for its cost.
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


def auxiliary_losses(
  options: LossOptions,
  logits: Float[Array, "G S E"],
  plan: RoutingPlan,
  context: RoutingContext,
  tokens: Float[Array, ""] | None = None,
  shares: Mapping[str, Array] | None = None,
) -> dict[str, Float[Array, ""]]:
  """Each of `options.names`, unweighted.

  Args:
    options: of the layer.
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
  for name in options.names:
    if _is_global(options, name):
      f, p = (mean(terms) for terms in TERMS[name](options, logits, plan, context))
      found[name] = losses.balance((shares or {}).get(name, f), p)
    else:
      found[name] = mean(LOSSES[name](options, logits, plan, context))
  return found


def global_shares(
  options: LossOptions,
  logits: Float[Array, "G S E"],
  plan: RoutingPlan,
  context: RoutingContext,
  tokens: Float[Array, ""] | None = None,
) -> dict[str, Float[Array, "..."]]:
  """f, [E] or [D], of each loss that multiplies f and P of the whole batch; arguments as of
  `auxiliary_losses`."""
  return {
    name: losses.over_groups(TERMS[name](options, logits, plan, context)[0], context.valid, tokens)
    for name in options.names
    if _is_global(options, name)
  }


def _is_global(options: LossOptions, name: str) -> bool:
  return name in TERMS and options.balance_over == "global"


def _balance(o: LossOptions, logits, plan, context):
  return jax.vmap(
    lambda l, q, v: losses.balance_terms(l, q, v, o.balance_counts, o.balance_scores)
  )(logits, plan, context.valid)


def _device(o: LossOptions, logits, plan, context):
  by_device = jax.vmap(lambda a: losses.by_device(a, o.devices))
  f, p = _balance(o, logits, plan, context)
  return by_device(f), by_device(p)


def _communication(o: LossOptions, logits, plan, context):
  return jax.vmap(
    lambda l, q, v: losses.communication_terms(l, q, v, o.devices, o.devices_a_token)
  )(logits, plan, context.valid)


# name -> f(options, logits [G, S, E], plan, context) -> (f, P) of each group, [G, E] or [G, D].
TERMS = {"balance": _balance, "device": _device, "communication": _communication}


def _product(name: str, o: LossOptions, logits, plan, context):
  return jax.vmap(losses.balance)(*TERMS[name](o, logits, plan, context))


def _z(o: LossOptions, logits, plan, context):
  return jax.vmap(losses.z)(logits, context.valid)


def _importance(o: LossOptions, logits, plan, context):
  return (
    jax.vmap(losses.gate_importance)(plan)
    if o.importance_of == "gates"
    else jax.vmap(losses.importance)(logits, context.valid)
  )


def _load(o: LossOptions, logits, plan, context):
  return jax.vmap(o.load, in_axes=(0, group_axes(context)))(logits, context)


def _threshold(o: LossOptions, logits, plan, context):
  return jax.vmap(lambda l, v: threshold_loss(l, context.threshold, v, o.k))(logits, context.valid)


# name -> f(options, logits [G, S, E], plan, context) -> [G], of each group, unweighted.
LOSSES = {
  **{name: functools.partial(_product, name) for name in TERMS},
  "z": _z,
  "importance": _importance,
  "load": _load,
  "threshold": _threshold,
}
