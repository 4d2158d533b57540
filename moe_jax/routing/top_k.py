"""Top-K token choice, as in GShard, Switch, GLaM, ST-MoE, V-MoE and Mixtral."""

from __future__ import annotations

from jaxtyping import Array, Float

from moe_jax.routing.options import Count, check_k
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.scored_top_k import route
from moe_jax.routing.token_choice import leak, probabilities


def top_k(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 2,
  gate_norm: str = "top_k",
  priority: str = "choice",
) -> RoutingPlan:
  """Routes each token to its K most probable experts.

  K = 1 with gate_norm "none" is Switch.

  Paper: Switch (arXiv 2101.03961) Sec. 2.1, GLaM (2112.06905), Mixtral (2401.04088), DBRX,
  Qwen1.5-MoE, OLMoE (2409.02060), DeepSeekMoE (2401.06066).

      p(x) = softmax(logits),  T = TopK(p(x) + b),  y = sum_{i in T} g_i(x) E_i(x)

  Among equal scores, the expert with the larger logit comes first; among equal logits, the expert
  with the lower index.

  Reads `context.valid` and `context.bias`. The bias b is used for selection only, as in loss-free
  balancing (arXiv 2408.15664); the gate is never biased.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding gets `expert` E and gate 0.
    k: The number of experts per token, K, in [1, E].
    gate_norm: The definition of the gate g. "none": p_i, normalised over all E experts (Switch,
      V-MoE, Qwen1.5-MoE, DeepSeekMoE, OLMoE). "top_k": p_i divided by the sum of p_j over T
      (Mixtral, DBRX, GLaM). At K = 1 the latter is the constant 1, so that the gradient of the
      task's loss with respect to the router is exactly zero.
    priority: The order in which assignments are served, see `token_choice`. "gate" orders tokens by
      the probability of their first choice.

  Returns:
    A plan with A = K*S assignments and gates in [0, 1].

  Raises:
    ConfigError: If k is outside [1, E], or if gate_norm or priority is unknown.
  """
  check_k("top_k", k, logits.shape[-1])
  return route(
    "top_k", logits, context, k=k, score="softmax", gate_norm=gate_norm, priority=priority
  )


ROUTER = Router(top_k, leak, biased=probabilities)
