"""Hierarchical routing to groups of experts and experts within them (Shazeer 2017, appendix B)."""

from __future__ import annotations

from typing import cast

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
  """Routes each token by noisy top-K to groups of experts, then to experts of each chosen group.

  Paper: Outrageously Large Neural Networks (Shazeer et al. 2017, arXiv 1701.06538) appendix B.

      y = sum_i sum_j G_primary(x)_i G_i(x)_j E_{i,j}(x),  each G as in Eqs. 3 to 5

  Expert (i, j) is expert i*E/N + j. G_primary is computed from `context.primary` and
  `context.primary_noise_std`, and the G_i from `logits` and `context.noise_std`. Each level
  normalises its gates over its own choices. Noise is drawn in training only, with fold_in(key, 0)
  for the groups and fold_in(key, 1) for the experts. Among equal noisy logits, the lower index
  comes first.

  At primary_k = 1 every G_primary is the constant 1, and at k = 1 every G_i is. That level then
  gets no gradient from the loss of the task.

  Reads `context.key`, `context.train`, `context.valid`, `context.primary` and, when noise is drawn,
  `context.noise_std` and `context.primary_noise_std`. It does not read the bias.

  Args:
    logits: Router outputs of one group of tokens. They are cast to float32.
    context: Padding gets `expert` E and gate 0.
    groups: The number of groups of experts, N, which must divide E.
    primary_k: The number of groups of experts per token, in [1, N].
    k: The number of experts per token in each of its groups, in [1, E/N].
    priority: The order in which assignments are served, see `token_choice`. The choices of a token
      are ordered by its choice of group, then by its choice within the group. "gate" orders tokens
      by the probability of their first choice over all groups and all experts of the group.

  Returns:
    A plan with A = S*primary_k*k assignments and gates in [0, 1], which sum to 1 over the choices
    of a token.

  Raises:
    ConfigError: If groups does not divide E, if primary_k is outside [1, N], if k is outside
      [1, E/N], or if the priority is unknown.
    ValueError: If `context.primary` is None or not of shape [S, N], or if noise must be drawn but a
      standard deviation is None.
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
  # The logarithm of the first choice's probability is the sum of the logarithms of the group's
  # probability and of the expert's probability within the group. log_sigmoid turns the logarithm
  # of the odds of an event into the logarithm of its probability.
  first = cast(
    Array,
    sum(
      jax.nn.log_sigmoid(log_odds(level, choice[:, 0]))
      for level, choice in ((primary, group), (inside[:, 0], member[:, 0]))
    ),
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
  """Returns CV^2 over experts of the smooth load of `hierarchical` (Shazeer 2017, appendix B).

      Load_{i,j} = Load_primary(X)_i Load_i(X^(i))_j / |X^(i)|
      X^(i) = the tokens that picked group i

  Load_primary and Load_i are sums of `losses.chosen_probability`. Padding belongs to no X. For a
  group that no token picked the quotient is 0/0, which is replaced by 0. The arguments are those of
  the router; its other options have no influence.

  Returns:
    0 at balance; E/(primary_k*k) - 1 if all tokens are certain to pick the same groups and the same
    experts in them; N/primary_k - 1 if they are certain to pick the same groups, within which the
    load is balanced.

  Raises:
    ConfigError: If an option is out of range, as in `hierarchical`.
    ValueError: If `context.primary` or a standard deviation of the noise is None.
  """
  num_tokens, num_experts = logits.shape
  _check(num_experts, groups, primary_k, k)
  primary, secondary = _noisy(logits, context, groups)
  clean = learned("hierarchical", context, "primary")
  primary_std = learned("hierarchical", context, "primary_noise_std")
  secondary_std = learned("hierarchical", context, "noise_std").reshape(secondary.shape)
  in_groups = losses.chosen_probability(clean, primary, primary_k, primary_std)  # [S, N]
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
  """Raises ConfigError unless the numbers of groups and experts are in range."""
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
  """Returns the noisy logits of the groups, [S, N], and of the experts in them, [S, N, E/N]."""
  num_tokens, num_experts = logits.shape
  primary = learned("hierarchical", context, "primary")
  if primary.shape != (num_tokens, groups):
    raise ValueError(
      f"RoutingContext.primary has shape {primary.shape}, but must have shape "
      f"{(num_tokens, groups)}, tokens by groups"
    )
  if context.train and context.key is not None:
    primary_std, std = (
      learned("hierarchical", context, field) for field in ("primary_noise_std", "noise_std")
    )
    primary = noise.perturb(primary, primary_std, jax.random.fold_in(context.key, 0), context.train)
    logits = noise.perturb(logits, std, jax.random.fold_in(context.key, 1), context.train)
  return primary, logits.astype(jnp.float32).reshape(num_tokens, groups, num_experts // groups)


def looks_ahead(primary_k: int, k: int, priority: str) -> Leak:
  """Returns the `Leak` of `hierarchical`, which makes primary_k * k choices per token."""
  return leak(primary_k * k, priority)


ROUTER = Router(
  hierarchical, looks_ahead, learned=("noise_std", "primary", "primary_noise_std"), smooth_load=load
)
