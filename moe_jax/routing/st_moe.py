"""ST-MoE's top-n: every expert after the best is kept at random, in proportion to its gate (arXiv
2202.08906)."""

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
  """Each token takes its best expert, and each of the next K - 1 with a probability that grows with
  its gate.

  Paper: ST-MoE (arXiv 2202.08906) appendix G; batch-prioritised routing: Table 18.

      p = softmax(logits),  T = TopK(p),  g_i = p_i / sum_{j in T} p_j for i in T
      the best expert is kept always, each other i in T with probability min(1, g_i / threshold)

  The paper's n is `k`. g is not normalised again over what is kept. A choice that is skipped names
  nobody and leaves its slot to others. Equal logits go to the expert of lower index. At K = 1 the
  gate is p_i itself, as in Switch, which is ST-MoE's top-1: normalised it would be the constant 1,
  which teaches the router nothing.

  Reads `context.key`, `context.train` and `context.valid`.

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: padding takes no expert: `expert` E and gate 0.
    k: experts a token at most, in [1, E].
    policy: which choices after the first are kept. "random": if r < g_i / threshold, with r ~ U(0,
      1) for each choice of each token; "threshold": if g_i > threshold; "all".
    threshold: > 0; the paper's is 0.2, and Table 21 tries 0.05.
    priority: who is served first, see `token_choice`. "gate" is batch-prioritised routing: tokens
      in order of the probability p of their first choice.

  Returns:
    A plan of A = K*S assignments, gates in [0, 1].

  Raises:
    ConfigError: k outside [1, E], an unknown policy or priority, threshold <= 0.

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
  # The softmax of the chosen logits is p_i / sum_{j in T} p_j, without the division by a sum that
  # may underflow.
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
