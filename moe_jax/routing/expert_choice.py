"""Expert choice, in which experts pick their tokens (Zhou et al. 2022, arXiv 2202.09368)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.options import Factor, slots
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router


def expert_choice(
  logits: Float[Array, "S E"], context: RoutingContext, *, capacity_factor: Factor = 2.0
) -> RoutingPlan:
  """Lets each expert pick its C = c*S/E tokens with the highest scores.

  The load is balanced by construction, so that no auxiliary loss is needed.

  Paper: Expert Choice (Zhou et al. 2022, arXiv 2202.09368) Sec. 3.2.

      S = softmax(logits) over experts,  G, I = TopK(S^T, C)  over tokens

  The paper's n, e, c and k are S, E, `capacity_factor` and C here, and its G and I are `gate` and
  `token`. Gates are not renormalised. A token gets between 0 and E experts, capacity_factor on
  average. Among equal scores, the earlier token comes first. C is computed from all S rows,
  including padding, so that it is static.

  Reads `context.valid`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding is never chosen. Slots that no real token fills name no expert.
    capacity_factor: The mean number of experts per token, c > 0. C is rounded and clipped to
      [1, S].

  Returns:
    A plan with A = E*C assignments, expert by expert, best token first. Gates are in [0, 1].

  Raises:
    ConfigError: If capacity_factor <= 0.
  """
  num_tokens, num_experts = logits.shape
  capacity = slots("expert_choice", capacity_factor, num_tokens, num_experts, "experts per token")
  # Experts rank tokens by the logarithms of the scores, because the scores may underflow.
  log_scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).T  # [E, S]
  valid = jnp.ones(num_tokens, bool) if context.valid is None else context.valid
  _, token = jax.lax.top_k(
    jax.lax.stop_gradient(jnp.where(valid, log_scores, -jnp.inf)), capacity
  )  # [E, C]
  gate = jnp.exp(jnp.take_along_axis(log_scores, token, axis=-1))
  expert = jnp.broadcast_to(jnp.arange(num_experts)[:, None], token.shape)
  real = valid[token]
  return RoutingPlan(
    token=token.reshape(-1),
    expert=jnp.where(real, expert, num_experts).reshape(-1),  # [E*C]
    gate=jnp.where(real, gate, 0.0).reshape(-1),
    num_experts=num_experts,
  )


# The tokens of a group compete for the same slots, whatever the dispatcher's capacity.
ROUTER = Router(expert_choice, "yes", competes=True)
