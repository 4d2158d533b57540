"""Experts in groups of equal size, of which a token uses only a few: what device- and node-limited
routing share."""

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
  """The scores, with -inf for the experts outside each token's best groups.

  Expert e belongs to group e // (E/groups). Equal groups: the lower index.

  Args:
    scores: by which experts are selected; finite.
    groups: number of groups, a divisor of E.
    kept_groups: how many of them each token may use, in [1, groups].
    best: a group's score is the sum of this many of its largest scores (of all, where it has
      fewer).
    add: how they are summed; logsumexp where the scores are logarithms.

  Returns:
    kept_groups * E/groups finite scores a token.
  """
  num_tokens, num_experts = scores.shape
  size = num_experts // groups
  grouped = scores.reshape(num_tokens, groups, size)
  largest, _ = jax.lax.top_k(grouped, min(best, size))  # [S, groups, best]
  _, kept = jax.lax.top_k(add(largest, axis=-1), kept_groups)  # [S, kept_groups]
  is_kept = jnp.any(kept[:, :, None] == jnp.arange(groups), axis=1)  # [S, groups]
  return jnp.where(is_kept[:, :, None], grouped, -jnp.inf).reshape(num_tokens, num_experts)


def check_groups(router: str, k: int, groups: int, kept_groups: int, num_experts: int) -> None:
  """Raises ConfigError unless `groups` divides E, and K experts fit in `kept_groups` of them."""
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
    f"between 1 and {limit}: so many experts are in {kept_groups} of {groups} groups of "
    f"{num_experts} experts",
  )
