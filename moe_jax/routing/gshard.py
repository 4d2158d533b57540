"""GShard's top-2 routing, which keeps second choices at random (arXiv 2006.16668, Algorithm 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.errors import ConfigError
from moe_jax.routing.options import Positive, check, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.policy import POLICIES
from moe_jax.routing.router import Leak, Router
from moe_jax.routing.token_choice import leak, token_choice


def gshard(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  second_policy: str = "random",
  threshold: Positive = 0.5,
  skipped_keeps_slot: bool = True,
) -> RoutingPlan:
  """Routes each token to its best expert, and at random to its second best.

  The probability of keeping the second expert grows with its gate.

  Paper: GShard (arXiv 2006.16668) Algorithm 1.

      gates = softmax(logits),  (g1, e1), (g2, e2) = top_2(gates)
      g1, g2 <- g1/(g1 + g2), g2/(g1 + g2)
      first loop over tokens:   e1 serves the token with g1 if c_e1 < C
                                c_e1 <- c_e1 + 1
      second loop over tokens:  e2 serves the token with g2 if c_e2 < C and 2 g2 > r
                                c_e2 <- c_e2 + 1
      r ~ U(0, 1), one number per token

  The plan holds all first choices by position, then all second choices. The dispatcher applies the
  capacity C. Among equal logits, the expert with the lower index comes first.

  A skipped second choice (2 g2 <= r) still counts in c_e2 and so uses up a slot. With
  `skipped_keeps_slot` it therefore names its expert with gate 0 and no gradient. Otherwise it names
  no expert, as in Mesh-TensorFlow.

  Mesh-TensorFlow is said to place second choices after the *kept* first choices, whereas c_e1
  counts all first choices. The effect is the same. If n tokens have an expert as first choice,
  min(n, C) of them are kept. If n < C, the two counts are equal; if n >= C, neither leaves a slot
  for a second choice.

  Reads `context.key`, `context.train` and `context.valid`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding gets `expert` E and gate 0.
    second_policy: Which second choices are kept. "random" keeps those with r < g2 / threshold,
      "threshold" those with g2 > threshold, "all" keeps all of them and "none" keeps none.
    threshold: The threshold of the policy, > 0. 0.5 is the paper's condition 2 g2 > r;
      Mesh-TensorFlow's value is 0.2.
    skipped_keeps_slot: Whether a skipped second choice uses up a slot. True is Algorithm 1 and
      False is Mesh-TensorFlow.

  Returns:
    A plan with A = 2*S assignments and gates in [0, 1].

  Raises:
    ConfigError: If there are fewer than 2 experts, if second_policy is unknown, or if threshold <=
      0.

  Deviation: outside training, or without a key, "random" keeps all second choices, so that
  evaluation is deterministic. In the paper, a slot used up by a skipped choice stays empty; here
  the token occupies it with gate 0.
  """
  num_experts = logits.shape[-1]
  if num_experts < 2:
    raise ConfigError(
      "model.moe.num_experts", num_experts, "top-2 routing (gshard) needs at least 2 experts"
    )
  check_name("gshard", "second_policy", second_policy, _POLICIES)
  check("gshard", "threshold", threshold, threshold > 0, "> 0; GShard's is 0.5")
  logits = logits.astype(jnp.float32)
  _, expert = jax.lax.top_k(jax.lax.stop_gradient(logits), 2)  # [S, 2]
  # The softmax of the two logits equals g_i / (g1 + g2). It avoids the division by a sum that may
  # underflow.
  gate = jax.nn.softmax(jnp.take_along_axis(logits, expert, axis=-1), axis=-1)
  second = jax.lax.stop_gradient(gate[:, 1])
  kept = jnp.stack(
    [jnp.ones(second.shape, bool), _POLICIES[second_policy](second, threshold, context)], axis=1
  )
  if not skipped_keeps_slot:
    expert = jnp.where(kept, expert, num_experts)
  return token_choice(expert, jnp.where(kept, gate, 0.0), context, num_experts, priority="choice")


# GShard has one more policy, with which it is top-1.
_POLICIES = {**POLICIES, "none": lambda gate, threshold, context: jnp.zeros(gate.shape, bool)}


def looks_ahead(second_policy: str) -> Leak:
  """Returns the `Leak` of `gshard`.

  It is "overflow" if there are second choices, because first choices are served before them.
  """
  return leak(1 if second_policy == "none" else 2, "choice")


ROUTER = Router(gshard, looks_ahead)
