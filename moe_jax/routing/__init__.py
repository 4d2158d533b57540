"""Who goes where: pure functions of one group's router logits, `vmap`ped over groups by the layer.

A router is `f(logits [S, E], context, *, options) -> RoutingPlan`. It knows neither the layer's capacity nor experts.
Losses and metrics are functions of (logits, plan), not a router's business. To add one: a file here and its lines in
the tables.
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

ROUTERS = {
    "adaptive_mixture": adaptive_mixture.adaptive_mixture,
    "noisy_top_k": noisy_top_k.noisy_top_k,
    "hierarchical": hierarchical.hierarchical,
    "strictly_balanced": strictly_balanced.strictly_balanced,
    "gshard": gshard.gshard,
    "top_k": top_k.top_k,
    "no_token_left_behind": no_token_left_behind.no_token_left_behind,
    "expert_choice": expert_choice.expert_choice,
    "capped_expert_choice": capped_expert_choice.capped_expert_choice,
    "st_moe": st_moe.st_moe,
    "device_limited": device_limited.device_limited,
    "sigmoid_bias": sigmoid_bias.sigmoid_bias,
    "base": base.base,
    "sinkhorn": sinkhorn.sinkhorn,
    "hash_layer": hash_layer.hash_layer,
    "random_choice": random_choice.random_choice,
}

# name -> f(**options) -> whether later tokens change what earlier ones get, in training:
#   "no"        never;
#   "overflow"  only where slots run out, and never which expert serves a token's first choice: a later token's first
#               choice displaces an earlier one's second (GShard, GLaM). Nothing leaks without a capacity;
#   "yes"       also a first choice. A causal model refuses such a router.
LOOKS_AHEAD = {
    "adaptive_mixture": adaptive_mixture.looks_ahead,
    "noisy_top_k": noisy_top_k.looks_ahead,
    "hierarchical": hierarchical.looks_ahead,
    "strictly_balanced": strictly_balanced.looks_ahead,
    "gshard": gshard.looks_ahead,
    "top_k": top_k.looks_ahead,
    "no_token_left_behind": no_token_left_behind.looks_ahead,
    "expert_choice": expert_choice.looks_ahead,
    "capped_expert_choice": capped_expert_choice.looks_ahead,
    "st_moe": st_moe.looks_ahead,
    "device_limited": device_limited.looks_ahead,
    "sigmoid_bias": sigmoid_bias.looks_ahead,
    "base": base.looks_ahead,
    "sinkhorn": sinkhorn.looks_ahead,
    "hash_layer": hash_layer.looks_ahead,
    "random_choice": random_choice.looks_ahead,
}

# name -> the fields of RoutingContext that the layer must learn for this router. Those not named need none.
LEARNED = {
    "noisy_top_k": ("noise_std",),
    "hierarchical": ("noise_std", "primary", "primary_noise_std"),
    "strictly_balanced": ("threshold",),
}

# name -> f(logits, context, **options) -> CV^2 of the smooth load under this router's own noise.
LOADS = {"noisy_top_k": noisy_top_k.load, "hierarchical": hierarchical.load}

# Which routers read `context.bias`, so that loss-free balancing can move them.
BIASED = ("top_k", "noisy_top_k", "device_limited", "sigmoid_bias")

__all__ = ["BIASED", "LEARNED", "LOADS", "LOOKS_AHEAD", "ROUTERS", "RoutingContext", "RoutingPlan", "group_axes"]
