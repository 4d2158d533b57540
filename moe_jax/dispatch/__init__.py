"""How tokens travel: one strategy a file, all equal in value and gradient.

A dispatcher is `f(plan, x, experts, capacity, platform, *, options) -> y`, over G groups at once:
plan of [G, A] arrays, x and y [G, S, D]. It serves, for each expert, the first `capacity`
assignments that name it (None: all).

On one device: `grouped`, or `scatter` with a capacity factor. On a mesh every dispatcher works, and
the axis "expert" splits tokens and experts; what a device of `expert` sends a layer and pass, for
its T tokens of K assignments each:

    all_to_all         2 f T D        f = E C / S: with a capacity factor
    ragged_all_to_all  2 K T D        dropless, large E; padded to a static worst case where XLA has
                                      no ragged one
    all_gather         2 expert T D   dropless, K not far below the size of the axis, or a very
                                      uneven load
    grouped            3 E D F        dropless, few experts and many tokens: weights travel, tokens
                                      do not
    einsum             2 f T D        as all_to_all, but by GSPMD's choice
    scatter            2 f T D        likewise on CPUs; on TPUs the backward pass sends 4 f T D, see
                                      `scatter`
"""

from moe_jax.dispatch.all_gather import all_gather
from moe_jax.dispatch.all_to_all import all_to_all
from moe_jax.dispatch.capacity import CapacityOptions, drop_overflow, expert_capacity, slot_index
from moe_jax.dispatch.einsum import einsum
from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.grouped import grouped
from moe_jax.dispatch.ragged_all_to_all import ragged_all_to_all
from moe_jax.dispatch.scatter import scatter

DISPATCHERS = {
  "einsum": einsum,
  "scatter": scatter,
  "grouped": grouped,
  "all_to_all": all_to_all,
  "ragged_all_to_all": ragged_all_to_all,
  "all_gather": all_gather,
}

__all__ = [
  "DISPATCHERS",
  "CapacityOptions",
  "ExpertFunction",
  "all_gather",
  "all_to_all",
  "drop_overflow",
  "einsum",
  "expert_capacity",
  "grouped",
  "ragged_all_to_all",
  "scatter",
  "slot_index",
]
