"""Expert threshold routing: expert choice for causal models, by thresholds of earlier batches."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.options import Count, check_k
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.sigmoid_bias import sigmoids
from moe_jax.routing.variable import Most, keep


def expert_threshold(
  logits: Float[Array, "S E"], context: RoutingContext, *, k: Count = 2, most: Most = 0
) -> RoutingPlan:
  """Routes each token to every expert whose threshold its score exceeds.

  Paper: Expert Threshold Routing (2026, arXiv 2603.11535).

      s = sigmoid(logits),  T = {j : s_j > theta_j},  y = sum_{j in T} s_j(x) E_j(x)
      theta_j <- (1 - u) theta_j + u (quantile of s_j over the tokens of the batch at 1 - k/E)

  Each expert thus gets k/E of the tokens, as in expert choice, but whether a token is among them
  does not depend on other tokens of its batch. A token may get any number of experts, also none.

  Reads `context.valid` and `context.bias`, which is -theta. Without a bias theta is 1/2. It is
  moved by `model.moe.balancing.rule` = expert_quantile, with the rate u.

  Deviation: the paper is known to us from its abstract; that scores are sigmoids and gates are the
  scores is our choice.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding gets no expert.
    k: The mean number of experts per token, in [1, E].
    most: At most so many experts per token, those that exceed their threshold most; 0 means E.

  Returns:
    A plan with A = S*most assignments and gates in [0, 1].

  Raises:
    ConfigError: If k or most is out of range.
  """
  check_k("expert_threshold", k, logits.shape[-1])
  gates = sigmoids(logits)
  # A bias of exactly 0 is the state before the first step, when no quantile is known.
  bias = jnp.float32(0.0) if context.bias is None else context.bias
  above = gates - jnp.where(bias == 0, 0.5, -bias)
  return keep("expert_threshold", above > 0, above, gates, context, most)


ROUTER = Router(expert_threshold, "no", biased=sigmoids, average="k", rules=("expert_quantile",))
