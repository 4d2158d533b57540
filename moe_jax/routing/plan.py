"""The one data type between router and dispatcher."""

from __future__ import annotations

import typing

from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key


@typing.no_type_check  # JAX rebuilds pytrees with placeholder leaves, which no shape check survives.
@struct.dataclass
class RoutingPlan:
  """Which token visits which expert, with what weight, in which order. One group of S tokens.

  Under `jax.vmap` over groups every array gains a leading axis G. The invariants:

  1. Order is priority: an expert with C slots serves the first C assignments that name it.
  2. `expert == num_experts` means nobody (padding, thresholds, overflow); its gate is 0.
  3. No (token, expert) pair with a real expert occurs twice.
  4. Only `gate` carries gradient; it is float32 and, as routers return it, not yet masked by capacity.

  A = S*K for token choice, E*C for expert choice, S*E for dense mixtures.
  """

  token: Int[Array, "*G A"]  # in [0, S)
  expert: Int[Array, "*G A"]  # in [0, E]
  gate: Float[Array, "*G A"]  # combine weight
  num_experts: int = struct.field(pytree_node=False)


@typing.no_type_check
@struct.dataclass
class RoutingContext:
  """What a router may look at besides the logits. A router's docstring names the fields that it reads.

  Attributes:
    key: PRNG key for noise, one a group; None where the caller wants determinism.
    valid: which tokens are real; padding takes no slot and counts in no loss. None: all are.
    token_ids: vocabulary ids of the tokens, for hash routing.
    bias: what balancing adds to each expert's score when experts are *selected* (never to the gate);
      shared by all groups.
    train: False turns off everything random.
  """

  key: Key[Array, "*G"] | None = None
  valid: Bool[Array, "*G S"] | None = None
  token_ids: Int[Array, "*G S"] | None = None
  bias: Float[Array, "E"] | None = None
  train: bool = struct.field(pytree_node=False, default=False)


# `in_axes` that map a context over groups: per-group fields on axis 0, the shared bias on none.
def group_axes(context: RoutingContext) -> RoutingContext:
  """The `in_axes` of `context` for a `jax.vmap` over groups: all fields by group, the bias shared."""
  axis = lambda leaf: None if leaf is None else 0
  return context.replace(key=axis(context.key), valid=axis(context.valid),
                         token_ids=axis(context.token_ids), bias=None)
