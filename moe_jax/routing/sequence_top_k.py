"""SeqTopK: the experts of a sequence are shared out among its tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.options import Count, check_k
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router


def sequence_top_k(
  logits: Float[Array, "S E"], context: RoutingContext, *, k: Count = 2
) -> RoutingPlan:
  """Chooses the S*K most probable pairs of token and expert of a group.

  Paper: Route Experts by Sequence, not by Token (2025, arXiv 2511.06494).

      P = softmax(logits) over experts,  T = TopK(P over all S*E pairs of the group, S*K)
      y_t = sum_{(t, i) in T} P_ti E_i(x_t)

  A group should be one sequence (`model.moe.group_rows` = 1). A token gets between 0 and E experts,
  K on average. Among equal probabilities the earlier token comes first, then the lower index.
  Padding counts in S*K, so that it is static, and chooses nothing. Whether a token gets an expert
  depends on later tokens, so that a causal model must allow it.

  Deviation: the paper is known to us from its abstract and title page; its online form for decoding
  is left out.

  Reads `context.valid`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding is never chosen.
    k: The mean number of experts per token, in [1, E].

  Returns:
    A plan with A = S*K assignments, most probable first, and gates in [0, 1].

  Raises:
    ConfigError: If k is out of range.
  """
  num_tokens, num_experts = logits.shape
  check_k("sequence_top_k", k, num_experts)
  # Logarithms order the pairs as probabilities do, and they do not underflow.
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  valid = jnp.ones(num_tokens, bool) if context.valid is None else context.valid
  ranked = jax.lax.stop_gradient(jnp.where(valid[:, None], log_probs, -jnp.inf))
  _, pair = jax.lax.top_k(ranked.reshape(-1), num_tokens * k)
  token, expert = jnp.divmod(pair, num_experts)
  real = valid[token]
  return RoutingPlan(
    token=token,
    expert=jnp.where(real, expert, num_experts),
    gate=jnp.where(real, jnp.exp(log_probs.reshape(-1)[pair]), 0.0),
    num_experts=num_experts,
  )


# The tokens of a group compete for the same S*K places, also in evaluation.
ROUTER = Router(sequence_top_k, "yes", competes=True)
