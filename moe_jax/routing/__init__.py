"""Who goes where: pure functions of one group's router logits, `vmap`ped over groups by the layer.

A router is `f(logits [S, E], context, *, options) -> RoutingPlan`. It knows neither capacity nor experts. Losses and
metrics are functions of (logits, plan), not a router's business. To add one: a file here and a line in each table.
"""

from moe_jax.routing.expert_choice import expert_choice
from moe_jax.routing.expert_choice import looks_ahead as expert_choice_looks_ahead
from moe_jax.routing.plan import RoutingContext, RoutingPlan, group_axes
from moe_jax.routing.top_k import looks_ahead as top_k_looks_ahead
from moe_jax.routing.top_k import top_k

ROUTERS = {"top_k": top_k, "expert_choice": expert_choice}

# name -> f(**options) -> bool: do later tokens influence earlier ones? A causal model refuses routers where they do.
LOOKS_AHEAD = {"top_k": top_k_looks_ahead, "expert_choice": expert_choice_looks_ahead}

__all__ = ["LOOKS_AHEAD", "ROUTERS", "RoutingContext", "RoutingPlan", "expert_choice", "group_axes", "top_k"]
