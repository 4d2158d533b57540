"""How tokens travel: one strategy a file, all equal in value and gradient.

A dispatcher is `f(plan, x, experts, capacity, platform, *, options) -> y`, over G groups at once: plan of [G, A]
arrays, x and y [G, S, D]. It serves, for each expert, the first `capacity` assignments that name it (None: all).
"""

from moe_jax.dispatch.capacity import drop_overflow, expert_capacity, slot_index
from moe_jax.dispatch.einsum import einsum
from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.grouped import grouped
from moe_jax.dispatch.scatter import scatter

DISPATCHERS = {"einsum": einsum, "scatter": scatter, "grouped": grouped}

__all__ = ["DISPATCHERS", "ExpertFunction", "drop_overflow", "einsum", "expert_capacity", "grouped", "scatter",
           "slot_index"]
