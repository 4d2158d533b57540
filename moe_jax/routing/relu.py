"""ReMoE: a ReLU in place of the top-k, so that routing is differentiable everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.options import Count, check_k
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.variable import Most, keep


def relu(
  logits: Float[Array, "S E"], context: RoutingContext, *, k: Count = 1, most: Most = 0
) -> RoutingPlan:
  """Routes each token to the experts with positive logits, which are the gates, too.

  Paper: ReMoE (Wang et al. 2024, arXiv 2412.14711) Eqs. 4 to 8.

      g(x) = ReLU(logits),  y = sum_i g_i(x) E_i(x)

  The number of experts is kept near k by the loss `sparsity`, whose weight adapts. With
  `model.moe.sparsity_loss` = 1e-8 and `model.moe.balancing.rule` = sparsity, the weight grows by
  20 % after each step with more than k experts a token on average, and shrinks by as much after
  each with fewer. Without these about half of the experts stay active.

  Reads `context.valid`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding gets no expert.
    k: The mean number of experts per token that the rule aims at, in [1, E].
    most: At most so many experts per token, those with the largest gates; 0 means E. Deviation: the
      paper has no bound. A smaller one saves memory, but drops experts at the start of training.

  Returns:
    A plan with A = S*most assignments and gates >= 0.

  Raises:
    ConfigError: If k or most is out of range.
  """
  check_k("relu", k, logits.shape[-1])
  logits = logits.astype(jnp.float32)
  return keep("relu", logits > 0, logits, jax.nn.relu(logits), context, most)


ROUTER = Router(relu, "no", average="k", rules=("sparsity",))
