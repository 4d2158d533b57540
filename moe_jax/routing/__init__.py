"""Routing algorithms, which decide which expert processes which token.

A `Router` holds a pure function `f(logits [S, E], context, *, options) -> RoutingPlan` together
with the facts about it that the rest of the package needs. The function routes one group of S
tokens; the layer applies `jax.vmap` over groups. It knows neither the capacity nor the experts of
the layer. Losses and metrics are separate functions of (logits, plan).

To add a router, write a file in this folder that ends in `ROUTER = Router(...)` and add its name to
the list below.
"""

import importlib

from moe_jax.routing.plan import RoutingContext, RoutingPlan, group_axes
from moe_jax.routing.router import Leak, Router

# Names of the files in this folder that end in `ROUTER = Router(...)`.
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
  "scored_top_k",
  "base",
  "sinkhorn",
  "hash_layer",
  "hash_top_k",
  "random_choice",
  "relu",
  "top_p",
  "expert_threshold",
  "sequence_top_k",
  "token_rounding",
  "sparse_mixer",
)

ROUTERS: dict[str, Router] = {
  name: importlib.import_module(f"moe_jax.routing.{name}").ROUTER for name in _FILES
}

__all__ = ["ROUTERS", "Leak", "Router", "RoutingContext", "RoutingPlan", "group_axes"]
