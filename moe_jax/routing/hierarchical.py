"""Hierarchical mixture of experts: a token picks groups, and in each of them experts (Shazeer 2017,
appendix B)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing import losses, noise
from moe_jax.routing.learned import learned
from moe_jax.routing.noisy_top_k import keep_top_k
from moe_jax.routing.options import Count, check, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Leak, Router
from moe_jax.routing.token_choice import PRIORITIES, leak, log_odds, token_choice


def hierarchical(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  groups: Count = 4,
  primary_k: Count = 2,
  k: Count = 2,
  priority: str = "choice",
) -> RoutingPlan:
  """Noisy top-K over N groups of experts, and noisy top-K over the experts of each group that a
  token picked.

  Paper: Outrageously Large Neural Networks (Shazeer et al. 2017, arXiv 1701.06538) appendix B.

      y = sum_i sum_j G_primary(x)_i G_i(x)_j E_{i,j}(x),  each G as in Eqs. 3 to 5

  Expert (i, j) is expert i*E/N + j. G_primary is computed from `context.primary` and
  `context.primary_noise_std`, the G_i from `logits` and `context.noise_std`; each level normalises
  over what it kept. Noise is drawn in training only, with fold_in(key, 0) for the groups and
  fold_in(key, 1) for the experts. Reads `context.valid` too, but no bias. Equal noisy logits go to
  the lower index.

  At primary_k = 1 every G_primary is the constant 1, at k = 1 every G_i: that level gets no
  gradient from the task.

  Args:
    logits: router outputs of one group of tokens; float32 arithmetic whatever their dtype.
    context: padding takes no expert: `expert` E and gate 0.
    groups: N, a divisor of E.
    primary_k: groups a token, in [1, N].
    k: experts a token in each of its groups, in [1, E/N].
    priority: who is served first, see `token_choice`. A token's choices are ordered by its choice
      of group, then by its choice in the group. "gate" orders tokens by the probability, over all
      groups and all experts of the group, of their first choice.

  Returns:
    A plan of A = S*primary_k*k assignments, gates in [0, 1], which sum to 1 over the choices of a
      token.

  Raises:
    ConfigError: groups does not divide E; primary_k outside [1, N]; k outside [1, E/N]; unknown
      priority.
    ValueError: `context.primary` is None or not [S, N]; noise is to be drawn, and a standard
      deviation is None.
  """
  num_tokens, num_experts = logits.shape
  _check(num_experts, groups, primary_k, k)
  check_name("hierarchical", "priority", priority, PRIORITIES)
  primary, secondary = _noisy(logits, context, groups)  # [S, N], [S, N, E/N]
  group, group_gate = keep_top_k(primary, primary, primary_k)  # [S, P]
  inside = jnp.take_along_axis(secondary, group[:, :, None], axis=1)  # [S, P, E/N]
  member, member_gate = keep_top_k(inside, inside, k)  # [S, P, K]
  expert = group[:, :, None] * (num_experts // groups) + member
  gate = group_gate[:, :, None] * member_gate
  # The logarithm of the first choice's probability: that of its group plus that in its group.
  first = sum(
    jax.nn.log_sigmoid(log_odds(level, named[:, 0]))
    for level, named in ((primary, group), (inside[:, 0], member[:, 0]))
  )
  return token_choice(
    expert.reshape(num_tokens, primary_k * k),
    gate.reshape(num_tokens, primary_k * k),
    context,
    num_experts,
    priority=priority,
    score=jax.lax.stop_gradient(first),
  )


def load(
  logits: Float[Array, "S E"], context: RoutingContext, *, groups: int, primary_k: int, k: int, **_
) -> Float[Array, ""]:
  """CV^2 over experts of the smooth load of `hierarchical` with these options and this context
  (appendix B).

      Load_{i,j} = Load_primary(X)_i Load_i(X^(i))_j / |X^(i)|,  X^(i) = the tokens that picked
        group i

  Load_primary and Load_i are sums of `losses.chosen_probability`. Padding is in no X. A group that
  no token picked has 0/0 there, for which this takes 0.

  Returns:
    0 at balance. E/(primary_k*k) - 1 where all tokens pick the same groups and the same experts in
      them without doubt;
    N/primary_k - 1 where they pick the same groups, which are balanced within.

  Raises:
    ConfigError: as `hierarchical`.
    ValueError: `context.primary` or a standard deviation of the noise is None.
  """
  num_tokens, num_experts = logits.shape
  _check(num_experts, groups, primary_k, k)
  primary, secondary = _noisy(logits, context, groups)
  primary_std = learned("hierarchical", context, "primary_noise_std")
  secondary_std = learned("hierarchical", context, "noise_std").reshape(secondary.shape)
  in_groups = losses.chosen_probability(context.primary, primary, primary_k, primary_std)  # [S, N]
  in_members = losses.chosen_probability(
    logits.reshape(secondary.shape), secondary, k, secondary_std
  )  # [S, N, E/N]
  real = jnp.ones(num_tokens) if context.valid is None else context.valid.astype(jnp.float32)
  group, _ = keep_top_k(primary, primary, primary_k)
  picked = real[:, None] * jnp.sum(jax.nn.one_hot(group, groups), axis=1)  # [S, N]: 1 in X^(i)
  share = (
    jnp.sum(picked[:, :, None] * in_members, axis=0)
    / jnp.maximum(jnp.sum(picked, axis=0), 1.0)[:, None]
  )
  loads = jnp.sum(real[:, None] * in_groups, axis=0)[:, None] * share  # [N, E/N]
  return losses.squared_variation(loads)


def _check(num_experts: int, groups: int, primary_k: int, k: int) -> None:
  check(
    "hierarchical",
    "groups",
    groups,
    groups >= 1 and num_experts % groups == 0,
    f"a divisor of num_experts={num_experts}",
  )
  check(
    "hierarchical",
    "primary_k",
    primary_k,
    1 <= primary_k <= groups,
    f"between 1 and groups={groups}",
  )
  inside = num_experts // groups
  check("hierarchical", "k", k, 1 <= k <= inside, f"between 1 and the {inside} experts of a group")


def _noisy(logits, context, groups):
  """Noisy logits of the groups, [S, N], and of the experts in each of them, [S, N, E/N]."""
  num_tokens, num_experts = logits.shape
  primary = learned("hierarchical", context, "primary")
  if primary.shape != (num_tokens, groups):
    raise ValueError(
      f"RoutingContext.primary is {primary.shape}, not tokens by groups {(num_tokens, groups)}"
    )
  if context.train and context.key is not None:
    primary_std, std = (
      learned("hierarchical", context, field) for field in ("primary_noise_std", "noise_std")
    )
    primary = noise.perturb(primary, primary_std, jax.random.fold_in(context.key, 0), context.train)
    logits = noise.perturb(logits, std, jax.random.fold_in(context.key, 1), context.train)
  return primary, logits.astype(jnp.float32).reshape(num_tokens, groups, num_experts // groups)


def looks_ahead(primary_k: int, k: int, priority: str) -> Leak:
  """Returns the leak of a token's primary_k * k choices."""
  return leak(primary_k * k, priority)


ROUTER = Router(
  hierarchical, looks_ahead, learned=("noise_std", "primary", "primary_noise_std"), smooth_load=load
)
