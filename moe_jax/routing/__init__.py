"""Who goes where: pure functions of one group's router logits, `vmap`ped over groups by the layer.

A `Router` holds a function `f(logits [S, E], context, *, options) -> RoutingPlan`, which knows neither the layer's
capacity nor its experts, and what the rest of the package must know about it. Losses and metrics are functions of
(logits, plan) and no business of a router. To add a router, write a file here that ends in `ROUTER = Router(...)`, and
add its line to `ROUTERS`.
"""

from moe_jax.routing import (
    adaptive_mixture,
    base,
    capped_expert_choice,
    device_limited,
    expert_choice,
    gshard,
    hash_layer,
    hierarchical,
    no_token_left_behind,
    noisy_top_k,
    random_choice,
    sigmoid_bias,
    sinkhorn,
    st_moe,
    strictly_balanced,
    top_k,
)
from moe_jax.routing.plan import RoutingContext, RoutingPlan, group_axes
from moe_jax.routing.router import Leak, Router

ROUTERS: dict[str, Router] = {
    "adaptive_mixture": adaptive_mixture.ROUTER,
    "noisy_top_k": noisy_top_k.ROUTER,
    "hierarchical": hierarchical.ROUTER,
    "strictly_balanced": strictly_balanced.ROUTER,
    "gshard": gshard.ROUTER,
    "top_k": top_k.ROUTER,
    "no_token_left_behind": no_token_left_behind.ROUTER,
    "expert_choice": expert_choice.ROUTER,
    "capped_expert_choice": capped_expert_choice.ROUTER,
    "st_moe": st_moe.ROUTER,
    "device_limited": device_limited.ROUTER,
    "sigmoid_bias": sigmoid_bias.ROUTER,
    "base": base.ROUTER,
    "sinkhorn": sinkhorn.ROUTER,
    "hash_layer": hash_layer.ROUTER,
    "random_choice": random_choice.ROUTER,
}

__all__ = ["ROUTERS", "Leak", "Router", "RoutingContext", "RoutingPlan", "group_axes"]
