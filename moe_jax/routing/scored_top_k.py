"""Token choice that is put together of a score, a bias, a rule for groups and a norm of gates.

`top_k`, `device_limited` and `sigmoid_bias` are forms of it with fixed parts, and share `route`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.options import OneOf
from moe_jax.routing.groups import check_groups, limit_to_groups
from moe_jax.routing.options import Count, NotNegative, check, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import (
  PRIORITIES,
  leak,
  log_odds,
  probabilities,
  select,
  token_choice,
)


class Score(NamedTuple):
  """A function s of the logits by which experts are chosen and weighed, in forms that are exact.

  Attributes:
    rank: Logits -> log s plus a constant of each token, which orders a token's experts as s does.
      Unlike s, it neither underflows nor saturates.
    log: Logits -> log s.
    value: Logits -> s.
    sure: (logits [S, E], expert [S]) -> numbers that order tokens by s of this expert. They carry
      no gradient.
  """

  rank: Callable[[Array], Array]
  log: Callable[[Array], Array]
  value: Callable[[Array], Array]
  sure: Callable[[Array, Array], Array]


def log_sqrt_softplus(logits: Float[Array, "*N E"]) -> Float[Array, "*N E"]:
  """Returns log sqrt(log(1 + exp(x))), which is finite and has a finite gradient at any x."""
  # Where x is below -10, log(log(1 + e^x)) is x - e^x / 2 up to e^(2x), which float32 does not
  # resolve beside x. Each branch gets only inputs for which its gradient is finite.
  low = logits < -10.0
  small, large = jnp.where(low, logits, -10.0), jnp.where(low, -10.0, logits)
  return 0.5 * jnp.where(low, small - 0.5 * jnp.exp(small), jnp.log(jax.nn.softplus(large)))


def _of_log(log: Callable[[Array], Array]) -> Score:
  """Returns the score that depends on an expert's own logit alone, given its logarithm."""

  def value(logits):
    return jnp.exp(log(logits))

  def sure(logits, expert):
    return jax.lax.stop_gradient(_gather(log(logits), expert[:, None])[:, 0])

  return Score(log, log, value, sure)


def _softmax() -> Score:
  """Returns the softmax over all experts, whose logarithms are the logits up to a constant."""

  def rank(logits):
    return logits

  def log(logits):
    return jax.nn.log_softmax(logits, axis=-1)

  return Score(rank, log, probabilities, log_odds)


SCORES = {
  "softmax": _softmax(),
  "sigmoid": _of_log(jax.nn.log_sigmoid),
  "sqrt_softplus": _of_log(log_sqrt_softplus),
}
# Name -> the number of a group's best scores whose sum is the score of the group.
GROUP_SCORES = {"max": 1, "top_2_sum": 2}
GATE_NORMS = ("none", "top_k")
BIASED = ("scores", "logits")


def scored_top_k(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 2,
  score: Annotated[str, OneOf(SCORES)] = "softmax",
  bias_on: Annotated[str, OneOf(BIASED)] = "scores",
  groups: Count = 1,
  kept_groups: Count = 1,
  group_score: Annotated[str, OneOf(GROUP_SCORES)] = "top_2_sum",
  gate_norm: Annotated[str, OneOf(GATE_NORMS)] = "top_k",
  norm_eps: NotNegative = 0.0,
  priority: str = "choice",
) -> RoutingPlan:
  """Routes each token to its K experts of the highest score plus bias, by parts that are named.

  Paper: DeepSeek-V4 with score "sqrt_softplus"; DeepSeek-V3 (arXiv 2412.19437) Sec. 2.1.2 with
  "sigmoid"; DeepSeek-V2 (arXiv 2405.04434) Sec. 2.2.2 with "softmax" and group_score "max".

      s = score(logits)
      N(x) = TopM over groups of the max, or the sum of the two highest, of s_i + b_i in the group
      T = TopK(s_i + b_i for i in N(x)),  g_i = s_i / (sum_{j in T} s_j + eps)
      y = sum_{i in T} g_i(x) E_i(x)

  Group n holds the E/groups consecutive experts that begin with expert n*E/groups. M is
  `kept_groups`. With one group there is no limit. Among groups with equal scores, the lower index
  comes first. Among experts with equal scores, the larger logit comes first, then the lower index.

  Reads `context.valid` and `context.bias`. The latter is b, and None stands for 0. The gate is
  never biased.

  Args:
    logits: Router outputs of one group of tokens. They are cast to float32.
    context: Padding gets `expert` E and gate 0.
    k: The number of experts per token, K, in [1, M*E/groups].
    score: The definition of s. "softmax": over all experts, in (0, 1). "sigmoid": in (0, 1).
      "sqrt_softplus": sqrt(log(1 + exp(x))), in (0, inf).
    bias_on: What b is added to when experts are chosen: the "scores", or the "logits" in their
      place (Kolibri), which needs groups=1.
    groups: The number of groups of experts, which must divide E.
    kept_groups: The number of groups that a token may use, M, in [1, groups].
    group_score: The score of a group. "max": that of its best expert (DeepSeek-V2). "top_2_sum":
      the sum of its two best (DeepSeek-V3).
    gate_norm: The definition of the gate g. "top_k": as in the equations above. At K = 1 and eps
      = 0 that is the constant 1, so that the gradient of the task's loss with respect to the router
      is exactly zero. "none": s_i.
    norm_eps: eps, which is added to the sum of gate_norm "top_k". Published code has 0, 1e-20 or
      1e-6.
    priority: The order in which assignments are served, see `token_choice`. "gate" orders tokens by
      s of their first choice.

  Returns:
    A plan with A = K*S assignments and gates >= 0.

  Raises:
    ConfigError: If groups does not divide E, if kept_groups, k or norm_eps is out of range, if an
      option names nothing that is known, or if bias_on is "logits" with several groups.
  """
  name = "scored_top_k"
  check_groups(name, k, groups, kept_groups, logits.shape[-1])
  check_name(name, "score", score, SCORES)
  check_name(name, "bias_on", bias_on, BIASED)
  check_name(name, "group_score", group_score, GROUP_SCORES)
  check(name, "norm_eps", norm_eps, 0 <= norm_eps < math.inf, ">= 0 and finite")
  check(
    name, "bias_on", bias_on, bias_on == "scores" or groups == 1, "'scores' if groups is above 1"
  )
  return route(
    name,
    logits,
    context,
    k=k,
    score=score,
    bias_on=bias_on,
    groups=groups,
    kept_groups=kept_groups,
    group_score=group_score,
    gate_norm=gate_norm,
    norm_eps=norm_eps,
    priority=priority,
  )


def route(
  router: str,
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: int,
  score: str,
  gate_norm: str,
  priority: str,
  bias_on: str = "scores",
  groups: int = 1,
  kept_groups: int = 1,
  group_score: str = "max",
  norm_eps: float = 0.0,
) -> RoutingPlan:
  """Returns the plan of `scored_top_k` for a router that has checked its k and its groups.

  Args:
    router: The name of the router, for error messages.
    logits: See `scored_top_k`, like all others.
    context: Its fields `valid` and `bias` are read.
    k: The number of experts per token.
    score: A key of `SCORES`.
    gate_norm: One of `GATE_NORMS`.
    priority: A key of `PRIORITIES`.
    bias_on: One of `BIASED`.
    groups: The number of groups of experts.
    kept_groups: The number of groups that a token may use.
    group_score: A key of `GROUP_SCORES`.
    norm_eps: The number that is added to the sum of the gates.

  Raises:
    ConfigError: If gate_norm or priority is unknown.
  """
  check_name(router, "gate_norm", gate_norm, GATE_NORMS)
  check_name(router, "priority", priority, PRIORITIES)
  s, logits = SCORES[score], logits.astype(jnp.float32)
  best, add = GROUP_SCORES[group_score], jnp.sum
  if context.bias is not None:
    ranked = _biased(logits, score=score, bias_on=bias_on) + context.bias
  else:
    # Without a bias, the logarithms order the experts as the scores do, and they do not underflow.
    ranked = s.rank(logits)
    if best > 1:
      # The logarithm of a sum of scores is the logsumexp of their logarithms.
      add = jax.nn.logsumexp
  if groups > 1:
    ranked = limit_to_groups(ranked, groups, kept_groups, best, add)
  # Logits decide between equal scores, because scores of large logits may be equal in float32. The
  # logits themselves need no such help. The result has shape [S, K].
  expert = select(ranked, k, ties=None if ranked is logits else logits)
  return token_choice(
    expert,
    gates(s, logits, expert, gate_norm, norm_eps),
    context,
    logits.shape[-1],
    priority=priority,
    score=s.sure(logits, expert[:, 0]),
  )


def gates(
  s: Score, logits: Float[Array, "S E"], expert: Int[Array, "S K"], gate_norm: str, norm_eps: float
) -> Float[Array, "S K"]:
  """Returns the gates of the chosen experts."""
  if gate_norm == "none":
    return _gather(s.value(logits), expert)
  if not norm_eps:
    # The softmax of log s_i equals s_i / sum_{j in T} s_j. It avoids the division by a sum that may
    # underflow.
    return jax.nn.softmax(_gather(s.rank(logits), expert), axis=-1)
  log_s = _gather(s.log(logits), expert)
  total = jax.nn.logsumexp(log_s, axis=-1, keepdims=True)
  return jnp.exp(log_s - jnp.logaddexp(total, math.log(norm_eps)))


def _gather(values: Float[Array, "S E"], expert: Int[Array, "S K"]) -> Float[Array, "S K"]:
  """Returns the value of each chosen expert."""
  return jnp.take_along_axis(values, expert, axis=-1)


def _biased(
  logits: Float[Array, "*N E"], *, score: str = "softmax", bias_on: str = "scores", **_: object
) -> Float[Array, "*N E"]:
  """Returns what the router adds the bias to."""
  logits = logits.astype(jnp.float32)
  return logits if bias_on == "logits" else SCORES[score].value(logits)


ROUTER = Router(scored_top_k, leak, biased=_biased)
