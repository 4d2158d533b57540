"""ST-MoE's top-n routing, which keeps choices after the first at random (arXiv 2202.08906)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.options import Count, Positive, check, check_k, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.policy import POLICIES
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import PRIORITIES, leak, log_odds, token_choice


def st_moe(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 2,
  policy: str = "random",
  threshold: Positive = 0.2,
  priority: str = "choice",
) -> RoutingPlan:
  """Routes each token to its best expert, and at random to each of the next K - 1.

  The probability of keeping one of these K - 1 experts grows with its gate.

  Paper: ST-MoE (arXiv 2202.08906) appendix G; batch-prioritised routing: Table 18.

      p = softmax(logits),  T = TopK(p),  g_i = p_i / sum_{j in T} p_j for i in T
      the best expert is always kept, each other i in T with probability min(1, g_i / threshold)

  The paper's n is `k`. The gates are not renormalised over the choices that are kept. A skipped
  choice names no expert and leaves its slot to others. Among equal logits, the expert with the
  lower index comes first. At K = 1 the gate is p_i itself, as in Switch, which is ST-MoE's top-1. A
  normalised gate would be the constant 1 there, which gives the router no gradient.

  Reads `context.key`, `context.train` and `context.valid`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding gets `expert` E and gate 0.
    k: The largest number of experts per token, K, in [1, E].
    policy: Which choices after the first are kept. "random" keeps those with r < g_i / threshold,
      where r ~ U(0, 1) is drawn for each choice of each token, "threshold" keeps those with g_i >
      threshold and "all" keeps all of them.
    threshold: The threshold of the policy, > 0. The paper uses 0.2, and its Table 21 tries 0.05.
    priority: The order in which assignments are served, see `token_choice`. "gate" is
      batch-prioritised routing, which orders tokens by the probability p of their first choice.

  Returns:
    A plan with A = K*S assignments and gates in [0, 1].

  Raises:
    ConfigError: If k is outside [1, E], if the policy or priority is unknown, or if threshold <= 0.

  Deviation: outside training, or without a key, "random" keeps all choices, so that evaluation is
  deterministic.
  """
  num_experts = logits.shape[-1]
  check_k("st_moe", k, num_experts)
  check_name("st_moe", "policy", policy, POLICIES)
  check("st_moe", "threshold", threshold, threshold > 0, "> 0; ST-MoE's is 0.2")
  check_name("st_moe", "priority", priority, PRIORITIES)
  logits = logits.astype(jnp.float32)
  _, expert = jax.lax.top_k(jax.lax.stop_gradient(logits), k)  # [S, K]
  probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), expert, axis=-1)
  # The softmax of the chosen logits equals p_i / sum_{j in T} p_j. It avoids the division by a sum
  # that may underflow.
  gate = probs if k == 1 else jax.nn.softmax(jnp.take_along_axis(logits, expert, axis=-1), axis=-1)
  kept = POLICIES[policy](jax.lax.stop_gradient(gate), threshold, context).at[:, 0].set(True)
  return token_choice(
    jnp.where(kept, expert, num_experts),
    gate,
    context,
    num_experts,
    priority=priority,
    score=log_odds(logits, expert[:, 0]),
  )


ROUTER = Router(st_moe, leak)
