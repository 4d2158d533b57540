"""Dispatchers, which move tokens to their experts and combine the results.

Each dispatcher is a strategy in a file of its own. All of them have the same values and gradients.

A dispatcher is a function `f(plan, x, experts, capacity, platform, *, options) -> y` of G groups
together. The plan has [G, A] arrays, and x and y have shape [G, S, D]. In each group it serves, for
each expert, the first `capacity` assignments that name it, or all of them if `capacity` is None.

On one device, use `grouped`, or `scatter` with a capacity factor. On a mesh every dispatcher works,
and the axis "expert" splits tokens and experts. For each dispatcher, the table shows how many
numbers a device sends per layer and pass for its T tokens with K assignments each, and when to use
it. In the table, expert is the size of the axis "expert".

    all_to_all         2 f T D        With a capacity factor, f = E C / S.
    ragged_all_to_all  2 K T D        Dropless with large E. Rows are padded to a static worst case
                                      if XLA has no ragged all-to-all. Its option buffer_factor
                                      bounds the memory for received rows.
    all_gather         2 expert T D   Dropless with K not far below the size of the axis, or with a
                                      very uneven load.
    grouped            3 E D F        Dropless with few experts and many tokens. The weights travel
                                      and the tokens do not.
    einsum             2 f T D        As all_to_all, but GSPMD chooses the communication.
    scatter            2 f T D        As einsum. On TPUs the backward pass sends 4 f T D, see
                                      `scatter`.

Decoding uses `few_tokens` where a call has at most `FEW_TOKENS` tokens. It reads the weights of the
chosen experts only, and a config cannot name it.
"""

from moe_jax.dispatch.all_gather import all_gather
from moe_jax.dispatch.all_to_all import all_to_all
from moe_jax.dispatch.buffers import fit_buffers
from moe_jax.dispatch.capacity import CapacityOptions, drop_overflow, expert_capacity, slot_index
from moe_jax.dispatch.einsum import einsum
from moe_jax.dispatch.expert_function import ExpertFunction
from moe_jax.dispatch.few_tokens import FEW_TOKENS, few_tokens
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
  "FEW_TOKENS",
  "CapacityOptions",
  "ExpertFunction",
  "all_gather",
  "all_to_all",
  "drop_overflow",
  "einsum",
  "expert_capacity",
  "fit_buffers",
  "few_tokens",
  "grouped",
  "ragged_all_to_all",
  "scatter",
  "slot_index",
]
