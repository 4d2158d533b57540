"""BASE layers: a balanced assignment instead of a balance loss (Lewis et al. 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.auction import auction
from moe_jax.routing.options import Precision, check
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import token_choice

_MAX_ROUNDS = (
  4.0  # times E/epsilon, which is what it takes where each price climbs over the range on its own
)


def base(
  logits: Float[Array, "S E"], context: RoutingContext, *, epsilon: Precision = 0.01
) -> RoutingPlan:
  """Each expert gets the same number of tokens, so that the sum of the logits is the largest
  possible.

  Paper: BASE layers (Lewis et al. 2021, arXiv 2103.16716) Sec. 3.

      training:   max over a of sum_t h_t . w_{a_t}  such that each expert gets T/E of the T tokens
      inference:  a_t = argmax_e h_t . w_e
      y_t = sigmoid(h_t . w_{a_t}) f_{a_t}(h_t)

  The logits are h.w, so the gate is sigmoid(logit of the assigned expert). T counts real tokens;
  where E does not divide it, each expert gets at most C = ceil(T/E), and some get fewer. The
  assignment is `auction`'s, and its total within E*C * epsilon * (largest - smallest logit) of the
  best, which is T * epsilon * range where E divides T. Outside training each token takes its best
  expert, which is not balanced and does not look at other tokens.

  Reads `context.valid` and `context.train`.

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: padding does not bid and names nobody: `expert` E and gate 0.
    epsilon: how far from the best the assignment may be, in [1e-4, 1]; smaller ones take more
      rounds. After 4*E/epsilon rounds, many more than are usual, the tokens left over are put
      greedily into free places.

  Returns:
    A plan of A = S assignments by position, gates in [0, 1].

  Raises:
    ConfigError: epsilon out of range.

  Deviation: the paper first shuffles tokens across workers, so that those that compete are not all
  neighbours; here they are those of the group. The paper's y has a residual + h_t, which is the
  model's business here.
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
  chosen = jnp.take_along_axis(logits, jnp.minimum(expert, num_experts - 1)[:, None], axis=-1)
  return token_choice(expert[:, None], jax.nn.sigmoid(chosen), context, num_experts)


# In training, tokens compete for experts. (Inference is greedy, and causal.)
ROUTER = Router(base, "yes")
