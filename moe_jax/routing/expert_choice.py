"""Expert choice: every expert takes the tokens it likes best (Zhou et al. 2022, arXiv
2202.09368)."""

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
  """Each expert picks its C = c*S/E highest-scoring tokens; no auxiliary loss is needed.

  Paper: Expert Choice (Zhou et al. 2022, arXiv 2202.09368) Sec. 3.2.

      S = softmax(logits) over experts,  G, I = TopK(S^T, C)  over tokens

  The paper's n, e, c, k are S, E, `capacity_factor`, C here; its G and I are `gate` and `token`;
  gates are not renormalised. A token gets between 0 and E experts, capacity_factor on average.
  Equal scores go to the earlier token. C is counted over all S rows, padding included, so that it
  is static.

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: `valid` is read: padding is never chosen; slots that no real token fills name nobody.
    capacity_factor: mean experts a token, > 0; C is rounded and clipped to [1, S].

  Returns:
    A plan of A = E*C assignments, expert by expert, best token first; gates in [0, 1].

  Raises:
    ConfigError: capacity_factor <= 0.
  """
  num_tokens, num_experts = logits.shape
  capacity = slots("expert_choice", capacity_factor, num_tokens, num_experts, "experts a token")
  log_scores = jax.nn.log_softmax(
    logits.astype(jnp.float32), axis=-1
  ).T  # [E, S]; scores themselves may underflow
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


# A group's tokens compete for the same slots, whatever the capacity.
ROUTER = Router(expert_choice, "yes")
