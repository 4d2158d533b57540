"""Who goes where: pure functions of one group's router logits, `vmap`ped over groups by the layer.

A `Router` holds a function `f(logits [S, E], context, *, options) -> RoutingPlan`, which knows
neither the layer's capacity nor its experts, and what the rest of the package must know about it.
Losses and metrics are functions of (logits, plan) and no business of a router. To add a router,
write a file here that ends in `ROUTER = Router(...)`, and add its name to the list below.
"""

import importlib

from moe_jax.routing.plan import RoutingContext, RoutingPlan, group_axes
from moe_jax.routing.router import Leak, Router

# Each is the name of a file here that ends in `ROUTER = Router(...)`.
_FILES = (
  "adaptive_mixture",
  "noisy_top_k",
  "hierarchical",
  "strictly_balanced",
  "gshard",
  "top_k",
  "no_token_left_behind",
  "expert_choice",
  "capped_expert_choice",
  "st_moe",
  "device_limited",
  "sigmoid_bias",
  "base",
  "sinkhorn",
  "hash_layer",
  "random_choice",
)

ROUTERS: dict[str, Router] = {
  name: importlib.import_module(f"moe_jax.routing.{name}").ROUTER for name in _FILES
}

__all__ = ["ROUTERS", "Leak", "Router", "RoutingContext", "RoutingPlan", "group_axes"]
