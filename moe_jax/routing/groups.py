"""Limits on the groups of experts that a token may use, for device- and node-limited routing."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.options import check


def limit_to_groups(
  scores: Float[Array, "S E"],
  groups: int,
  kept_groups: int,
  best: int,
  add: Callable[..., Array] = jnp.sum,
) -> Float[Array, "S E"]:
  """Replaces the scores of the experts outside each token's best groups by -inf.

  Expert e belongs to group e // (E/groups). Among groups with equal scores, the lower index comes
  first.

  Args:
    scores: The scores by which experts are selected. They must be finite.
    groups: The number of groups, a divisor of E.
    kept_groups: The number of groups that each token may use, in [1, groups].
    best: The number of a group's largest scores whose sum is the score of the group. If the group
      has fewer experts, all of them count.
    add: The function that sums the scores, which is logsumexp if the scores are logarithms.

  Returns:
    The scores, of which kept_groups * E/groups per token are finite.
  """
  num_tokens, num_experts = scores.shape
  size = num_experts // groups
  grouped = scores.reshape(num_tokens, groups, size)
  largest, _ = jax.lax.top_k(grouped, min(best, size))  # [S, groups, best]
  _, best_groups = jax.lax.top_k(add(largest, axis=-1), kept_groups)  # [S, kept_groups]
  is_kept = jnp.any(best_groups[:, :, None] == jnp.arange(groups), axis=1)  # [S, groups]
  return jnp.where(is_kept[:, :, None], grouped, -jnp.inf).reshape(num_tokens, num_experts)


def check_groups(router: str, k: int, groups: int, kept_groups: int, num_experts: int) -> None:
  """Raises ConfigError unless `groups` divides E and `kept_groups` groups hold K experts."""
  check(
    router,
    "groups",
    groups,
    groups >= 1 and num_experts % groups == 0,
    f"a divisor of num_experts={num_experts}",
  )
  check(
    router, "kept_groups", kept_groups, 1 <= kept_groups <= groups, f"between 1 and groups={groups}"
  )
  limit = kept_groups * num_experts // groups
  check(
    router,
    "k",
    k,
    1 <= k <= limit,
    f"between 1 and {limit}, the number of experts in {kept_groups} of {groups} groups of "
    f"{num_experts} experts",
  )
