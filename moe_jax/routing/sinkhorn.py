"""S-BASE routing, which balances the load by Sinkhorn's algorithm (Clark et al. 2022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.routing.options import Count, Divisor, Iterations, check, check_k, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import PRIORITIES, log_odds, token_choice


def sinkhorn(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 1,
  iterations: Iterations = 30,
  temperature: Divisor = 1.0,
  priority: str = "choice",
) -> RoutingPlan:
  """Routes each token to the K experts with its largest shares in a balanced transport plan.

  The gates are the token's own probabilities.

  Paper: S-BASE in Unified Scaling Laws for Routed Language Models (Clark et al. 2022, arXiv
  2202.01169).

      P = argmax sum_te P_te x_te + tau H(P)  such that sum_e P_te = 1 and sum_t P_te = T/E
      training:  T_t = TopK_e(P_te);  inference:  T_t = TopK_e(x_te)
      g_te = softmax(x_t)_e for e in T_t

  Here x are the logits, H is the entropy, tau is `temperature` and T is the number of real tokens.
  The function `balanced` computes P. Only the choice of experts uses P; the gate, and with it the
  gradient, is the unbalanced probability. P is balanced, but the choice is balanced only
  approximately: tokens with the same logits have the same row of P and therefore the same experts.
  If all tokens are the same, P is 1/E everywhere. Among equal entries, the expert with the lower
  index comes first, but rounding may distinguish entries that are equal in theory.

  Reads `context.valid` and `context.train`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding has no row in P; it gets `expert` E and gate 0.
    k: The number of experts per token, K, in [1, E].
    iterations: The number of rounds of normalisation, >= 1.
    temperature: The weight of the entropy, tau > 0. With a smaller value, P is closer to BASE's
      hard assignment and needs more iterations.
    priority: The order in which assignments are served, see `token_choice`. "gate" orders tokens by
      the probability of their first choice.

  Returns:
    A plan with A = K*S assignments and gates in [0, 1].

  Raises:
    ConfigError: If k is outside [1, E], if iterations < 1, if temperature <= 0, or if the priority
      is unknown.

  Deviation: the number of iterations is fixed instead of depending on a tolerance.
  """
  num_experts = logits.shape[-1]
  check_k("sinkhorn", k, num_experts)
  check("sinkhorn", "iterations", iterations, iterations >= 1, ">= 1")
  check("sinkhorn", "temperature", temperature, temperature > 0, "> 0")
  check_name("sinkhorn", "priority", priority, PRIORITIES)
  logits = logits.astype(jnp.float32)
  scores = balanced(logits, context.valid, iterations, temperature) if context.train else logits
  _, expert = jax.lax.top_k(jax.lax.stop_gradient(scores), k)  # [S, K]
  gate = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), expert, axis=-1)
  return token_choice(
    expert, gate, context, num_experts, priority=priority, score=log_odds(logits, expert[:, 0])
  )


def balanced(
  logits: Float[Array, "S E"], valid: Bool[Array, "S"] | None, iterations: int, temperature: float
) -> Float[Array, "S E"]:
  """Returns log P, which Sinkhorn's algorithm computes by scaling columns and rows in turn.

  Rows are scaled last, so that their sums are exact. The result carries no gradient. The rows of
  padding are meaningless and have no influence on the columns.

  Args:
    logits: Router outputs of one group, float32.
    valid: True for real tokens. None means that all tokens are real.
    iterations: The number of rounds of normalisation.
    temperature: The weight of the entropy, tau.
  """
  num_tokens, num_experts = logits.shape
  x = jax.lax.stop_gradient(logits) / temperature
  real = jnp.ones((num_tokens, 1), bool) if valid is None else valid[:, None]
  target = jnp.log(jnp.maximum(jnp.sum(real), 1) / num_experts)

  def normalise(_, log_p):
    columns = jax.nn.logsumexp(log_p, axis=0, where=real)
    # Without any real token the sum is empty and its logarithm is -inf.
    columns = jnp.where(jnp.any(real), columns, 0.0)
    log_p = log_p + target - columns
    return log_p - jax.nn.logsumexp(log_p, axis=-1, keepdims=True)

  return jax.lax.fori_loop(0, iterations, normalise, jax.nn.log_softmax(x, axis=-1))


# In training, the choice of a token depends on the logits of all others. Inference is causal.
ROUTER = Router(sinkhorn, "yes")
