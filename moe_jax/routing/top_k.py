"""Token choice: every token takes its K most probable experts (GShard, Switch, GLaM, ST-MoE, V-MoE,
Mixtral)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.routing.options import Count, check_k, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import PRIORITIES, leak, log_odds, select, token_choice


def top_k(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 2,
  gate_norm: str = "top_k",
  priority: str = "choice",
) -> RoutingPlan:
  """Each token picks its K most probable experts; K = 1 with gate_norm "none" is Switch.

  Paper: Switch (arXiv 2101.03961) Sec. 2.1, GLaM (2112.06905), Mixtral (2401.04088), DBRX,
  Qwen1.5-MoE, OLMoE (2409.02060), DeepSeekMoE (2401.06066).

      p(x) = softmax(logits),  T = TopK(p(x) + b),  y = sum_{i in T} g_i(x) E_i(x)

  Equal scores go to the expert of larger logit, equal logits to that of lower index. Reads
  `context.valid` and `context.bias` (b, for selection only, as in loss-free balancing, arXiv
  2408.15664; the gate is never biased).

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: padding takes no expert: `expert` E and gate 0.
    k: experts a token, in [1, E].
    gate_norm: what g is. "none": p_i, out of all E experts (Switch, V-MoE, Qwen1.5-MoE,
      DeepSeekMoE, OLMoE); "top_k": p_i divided by the sum over T of p_j (Mixtral, DBRX, GLaM). At K
      = 1 the latter is the constant 1: the task's loss then gives the router a gradient of exactly
      zero.
    priority: who is served first, see `token_choice`; "gate" orders tokens by the probability of
      their first choice.

  Returns:
    A plan of A = K*S assignments, gates in [0, 1].

  Raises:
    ConfigError: k outside [1, E]; unknown gate_norm or priority.
  """
  num_experts = logits.shape[-1]
  check_k("top_k", k, num_experts)
  check_name("top_k", "gate_norm", gate_norm, _GATE_NORMS)
  check_name("top_k", "priority", priority, PRIORITIES)
  logits = logits.astype(jnp.float32)
  probs = jax.nn.softmax(logits, axis=-1)
  # Without a bias the logits have the order of the probabilities, and do not underflow.
  expert = (
    select(logits, k) if context.bias is None else select(probs + context.bias, k, ties=logits)
  )  # [S, K]
  gate = _GATE_NORMS[gate_norm](logits, probs, expert)
  return token_choice(
    expert, gate, context, num_experts, priority=priority, score=log_odds(logits, expert[:, 0])
  )


def _gather(values: Float[Array, "S E"], expert: Int[Array, "S K"]) -> Float[Array, "S K"]:
  return jnp.take_along_axis(values, expert, axis=-1)


_GATE_NORMS = {
  "none": lambda logits, probs, expert: _gather(probs, expert),
  # The softmax of the chosen logits is p_i / sum_{j in T} p_j, without the division by a sum that
  # may underflow.
  "top_k": lambda logits, probs, expert: jax.nn.softmax(_gather(logits, expert), axis=-1),
}


ROUTER = Router(top_k, leak, reads_bias=True)
