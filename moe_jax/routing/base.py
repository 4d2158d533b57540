"""BASE layers, which balance the load by assignment instead of by a loss (Lewis et al. 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.auction import auction
from moe_jax.routing.options import Precision, check
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import token_choice

# The limit of the auction's rounds, as a multiple of E/epsilon. E/epsilon rounds suffice if one
# price at a time climbs over the whole range of the logits.
_MAX_ROUNDS = 4.0


def base(
  logits: Float[Array, "S E"], context: RoutingContext, *, epsilon: Precision = 0.01
) -> RoutingPlan:
  """Assigns the same number of tokens to each expert, with the largest possible sum of logits.

  Paper: BASE layers (Lewis et al. 2021, arXiv 2103.16716) Sec. 3.

      training:   max over a of sum_t h_t . w_{a_t}  such that each expert gets T/E of the T tokens
      inference:  a_t = argmax_e h_t . w_e
      y_t = sigmoid(h_t . w_{a_t}) f_{a_t}(h_t)

  The logits are h.w, so the gate is the sigmoid of the assigned expert's logit. T counts real
  tokens. If E does not divide T, each expert gets at most C = ceil(T/E) tokens, and some get fewer.
  The function `auction` finds the assignment. Its total is within E*C * epsilon * (largest -
  smallest logit) of the optimum, which is T * epsilon * range if E divides T. Outside training each
  token takes its best expert, which is not balanced and does not look at other tokens.

  Reads `context.valid` and `context.train`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding does not bid; it gets `expert` E and gate 0.
    epsilon: The tolerance of the assignment, in [1e-4, 1], in units of the range of the logits.
      Smaller values take more rounds. After 4*E/epsilon rounds, many more than usual, the remaining
      tokens are placed greedily.

  Returns:
    A plan with A = S assignments in order of position and gates in [0, 1].

  Raises:
    ConfigError: If epsilon is out of range.

  Deviation: the paper first shuffles tokens across workers, so that the tokens that compete are not
  all neighbours. Here the tokens of a group compete. The paper's y includes the residual h_t, which
  the model adds here.
  """
  num_tokens, num_experts = logits.shape
  check(
    "base",
    "epsilon",
    epsilon,
    1e-4 <= epsilon <= 1,
    "between 1e-4 and 1 (of the range of the logits)",
  )
  logits = logits.astype(jnp.float32)
  if context.train:
    valid = jnp.ones(num_tokens, bool) if context.valid is None else context.valid
    expert, _ = auction(logits, valid, epsilon, max_rounds=int(_MAX_ROUNDS * num_experts / epsilon))
  else:
    expert = jnp.argmax(logits, axis=-1)
  # Padding has expert E, which is out of bounds; `token_choice` sets its gate to 0.
  chosen = jnp.take_along_axis(logits, jnp.minimum(expert, num_experts - 1)[:, None], axis=-1)
  return token_choice(expert[:, None], jax.nn.sigmoid(chosen), context, num_experts)


# In training, tokens compete for experts. Inference is greedy and therefore causal.
ROUTER = Router(base, "yes")
