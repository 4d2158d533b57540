"""The data types that connect the layer, its router and its dispatcher."""

from __future__ import annotations

import dataclasses
import typing

from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, UInt32


# JAX rebuilds pytrees with placeholder leaves that are not arrays, so the checks of shapes at run
# time are switched off for this class and the next.
@typing.no_type_check
class RoutingPlan(struct.PyTreeNode):
  """The list of assignments of tokens to experts for one group of S tokens, in order of priority.

  Under `jax.vmap` over groups every array gains a leading axis G. Every plan satisfies four
  invariants:

  1. The order is the priority: an expert with C slots serves the first C assignments that name it.
  2. `expert == num_experts` means that the assignment names no expert (because of padding, a
     threshold or overflow). Its gate is 0.
  3. No (token, expert) pair with a real expert occurs twice.
  4. Only `gate` carries gradient. It is float32 and, as routers return it, not yet masked by
     capacity.

  The number of assignments A is S*K for token choice, E*C for expert choice and S*E for dense
  mixtures.

  Attributes:
    token: The index of each assignment's token in the group, in [0, S).
    expert: The index of each assignment's expert, in [0, E]. E stands for no expert.
    gate: The combine weight of each assignment.
    num_experts: The number of experts E.
  """

  token: Int[Array, "*G A"]  # in [0, S)
  expert: Int[Array, "*G A"]  # in [0, E]
  gate: Float[Array, "*G A"]  # combine weight
  num_experts: int = struct.field(pytree_node=False)


@typing.no_type_check
class RoutingContext(struct.PyTreeNode):
  """The inputs of a router besides the logits.

  The docstring of each router names the fields that it reads. A field that is None is not provided.

  Attributes:
    key: PRNG key for noise, one per group. None requests deterministic routing.
    valid: True for real tokens. Padding takes no slot and counts in no loss. None means that all
      tokens are real.
    token_ids: Vocabulary ids of the tokens, for hash routing.
    group: The index of the group among the G groups of its batch.
    salt: A hash of the run's seed and the layer's index, shared by all groups. It makes routers
      that learn nothing differ between layers and between seeds. It is the same in training, in
      evaluation and after a resume.
    bias: The value that load balancing adds to each expert's score when experts are *selected*. It
      never changes the gate. It is shared by all groups.
    noise_std: Standard deviation, > 0, of the learned noise on each logit (Shazeer's softplus(x
      W_noise)).
    primary: Logits of the N groups of experts in hierarchical gating.
    primary_noise_std: Standard deviation of the noise on `primary`.
    threshold: A learned threshold per expert, shared by all groups (Shazeer 2017, appendix F).
    train: Whether this is a training step. False turns off everything random.
  """

  key: Key[Array, "*G"] | None = None
  valid: Bool[Array, "*G S"] | None = None
  token_ids: Int[Array, "*G S"] | None = None
  group: Int[Array, "*G"] | None = None
  salt: UInt32[Array, ""] | None = None
  bias: Float[Array, "E"] | None = None
  noise_std: Float[Array, "*G S E"] | None = None
  primary: Float[Array, "*G S N"] | None = None
  primary_noise_std: Float[Array, "*G S N"] | None = None
  threshold: Float[Array, "E"] | None = None
  train: bool = struct.field(pytree_node=False, default=False)


_SHARED = ("bias", "threshold", "salt")  # fields without an axis of groups


def group_axes(context: RoutingContext) -> RoutingContext:
  """Returns the `in_axes` of `context` for `jax.vmap` over groups.

  Fields that all groups share, and fields that are None, have no axis to map over.
  """
  fields = [f.name for f in dataclasses.fields(context) if f.name != "train"]
  return context.replace(
    **{name: None if name in _SHARED or getattr(context, name) is None else 0 for name in fields}
  )
