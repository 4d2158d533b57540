"""The one data type between router and dispatcher."""

from __future__ import annotations

import dataclasses
import typing

from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, UInt32


# JAX rebuilds pytrees with placeholder leaves, which no shape check survives.
@typing.no_type_check
@struct.dataclass
class RoutingPlan:
  """Which token visits which expert, with what weight, in which order. One group of S tokens.

  Under `jax.vmap` over groups every array gains a leading axis G. The invariants:

  1. Order is priority: an expert with C slots serves the first C assignments that name it. 2.
  `expert == num_experts` means nobody (padding, thresholds, overflow); its gate is 0. 3. No (token,
  expert) pair with a real expert occurs twice. 4. Only `gate` carries gradient; it is float32 and,
  as routers return it, not yet masked by capacity.

  A = S*K for token choice, E*C for expert choice, S*E for dense mixtures.
  """

  token: Int[Array, "*G A"]  # in [0, S)
  expert: Int[Array, "*G A"]  # in [0, E]
  gate: Float[Array, "*G A"]  # combine weight
  num_experts: int = struct.field(pytree_node=False)


@typing.no_type_check
@struct.dataclass
class RoutingContext:
  """What a router may look at besides the logits. A router's docstring names the fields that it
  reads.

  Attributes:
    key: PRNG key for noise, one a group; None where the caller wants determinism.
    valid: which tokens are real; padding takes no slot and counts in no loss. None: all are.
    token_ids: vocabulary ids of the tokens, for hash routing.
    group: the index of the group among the G of its batch.
    salt: a hash of the run's seed and the layer's index, shared by all groups. It makes routers
      that learn nothing differ between layers and between seeds; it is the same in training and
      evaluation and after a resume.
    bias: what balancing adds to each expert's score when experts are *selected* (never to the
      gate); shared by all groups.
    noise_std: standard deviation, > 0, of the learned noise on each logit (Shazeer's softplus(x
      W_noise)).
    primary: logits of the N groups of experts (hierarchical gating).
    primary_noise_std: of the noise on those.
    threshold: learned, by expert, shared by all groups (Shazeer 2017, appendix F).
    train: False turns off everything random.
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


_SHARED = ("bias", "threshold", "salt")  # by all groups


def group_axes(context: RoutingContext) -> RoutingContext:
  """The `in_axes` of `context` for a `jax.vmap` over groups: all fields by group, what experts
  share by none."""
  fields = [f.name for f in dataclasses.fields(context) if f.name != "train"]
  return context.replace(
    **{name: None if name in _SHARED or getattr(context, name) is None else 0 for name in fields}
  )
