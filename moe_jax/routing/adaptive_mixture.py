"""The first mixture of experts, which is dense (Jacobs, Jordan, Nowlan and Hinton 1991)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import token_choice


def adaptive_mixture(logits: Float[Array, "S E"], context: RoutingContext) -> RoutingPlan:
  """Routes every token to every expert, weighted by a softmax over all experts.

  Paper: Adaptive Mixtures of Local Experts (Jacobs et al., Neural Computation 3, 1991) Sec. 1.

      p_j = exp(x_j) / sum_i exp(x_i),  y = sum_i p_i o_i

  The paper's x_j, p_j and o_j are the logits, the gates and the experts' outputs. The error
  functions that the paper trains with are in `mixture_errors`.

  Reads `context.valid`.

  Args:
    logits: Gate outputs of one group. They are cast to float32.
    context: Padding gets `expert` E and gate 0.

  Returns:
    A plan with A = S*E assignments: experts 0 to E - 1 of token 0, then those of token 1 and so on.
    Gates are in [0, 1] and sum to 1 over the experts of a token.

  Deviation: the paper interprets the gate as a selector that picks one expert at random with
  probability p_j, and its error of Eq. 1.3 as the likelihood under such picks. The blend y is the
  mean of such picks, which the error of Eq. 1.1 compares with the target.
  """
  num_experts = logits.shape[-1]
  probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  expert = jnp.broadcast_to(jnp.arange(num_experts), probs.shape)
  return token_choice(expert, probs, context, num_experts, priority="token")


# The gates of a token depend on that token alone, and earlier tokens are served first.
ROUTER = Router(adaptive_mixture, "no")
