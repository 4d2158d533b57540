"""GShard's top-2: the second expert is kept at random, in proportion to its gate (arXiv 2006.16668,
Algorithm 1)."""

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
  """Each token takes its best expert, and its second best with a probability that grows with that
  one's gate.

  Paper: GShard (arXiv 2006.16668) Algorithm 1.

      gates = softmax(logits),  (g1, e1), (g2, e2) = top_2(gates),  g1, g2 <- g1/(g1 + g2), g2/(g1 +
                                g2)
      first loop over tokens:   e1 serves the token with g1 if c_e1 < C;                c_e1 <- c_e1
                                + 1
      second loop over tokens:  e2 serves it with g2 if c_e2 < C and 2 g2 > r;          c_e2 <- c_e2
                                + 1
      r ~ U(0, 1), one number a token

  The plan holds all first choices by position, then all second ones; C is the dispatcher's
  business. Equal logits go to the expert of lower index.

  A skipped second choice (2 g2 <= r) still counts in c_e2, and so uses up a slot. With
  `skipped_keeps_slot` it therefore names its expert with gate 0 and no gradient; without, as in
  Mesh-TensorFlow, it names nobody.

  Mesh-TensorFlow is said to place second choices after the *kept* first choices, whereas c_e1
  counts all of them. The effect is the same: with n first choices of an expert, min(n, C) of them
  are kept. Where n < C the two counts are equal; where n >= C neither leaves a slot to a second
  choice.

  Reads `context.key`, `context.train` and `context.valid`.

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: padding takes no expert: `expert` E and gate 0.
    second_policy: which second choices are kept. "random": if r < g2 / threshold; "threshold": if
      g2 > threshold; "all"; "none".
    threshold: > 0. 0.5 is the paper's 2 g2 > r; Mesh-TensorFlow's value is 0.2.
    skipped_keeps_slot: Algorithm 1 if true, Mesh-TensorFlow if false.

  Returns:
    A plan of A = 2*S assignments, gates in [0, 1].

  Raises:
    ConfigError: fewer than 2 experts, an unknown second_policy, threshold <= 0.

  Deviation: outside training, or without a key, "random" keeps all second choices, so that
  evaluation is deterministic. In the paper a slot used up by a skipped choice stays empty; here the
  token travels there and counts for nothing.
  """
  num_experts = logits.shape[-1]
  if num_experts < 2:
    raise ConfigError(
      "model.moe.num_experts", num_experts, "top-2 routing (gshard) needs 2 experts at least"
    )
  check_name("gshard", "second_policy", second_policy, _POLICIES)
  check("gshard", "threshold", threshold, threshold > 0, "> 0; GShard's is 0.5")
  logits = logits.astype(jnp.float32)
  _, expert = jax.lax.top_k(jax.lax.stop_gradient(logits), 2)  # [S, 2]
  # The softmax of the two logits is g_i / (g1 + g2), without the division by a sum that may
  # underflow.
  gate = jax.nn.softmax(jnp.take_along_axis(logits, expert, axis=-1), axis=-1)
  second = jax.lax.stop_gradient(gate[:, 1])
  kept = jnp.stack(
    [jnp.ones(second.shape, bool), _POLICIES[second_policy](second, threshold, context)], axis=1
  )
  if not skipped_keeps_slot:
    expert = jnp.where(kept, expert, num_experts)
  return token_choice(expert, jnp.where(kept, gate, 0.0), context, num_experts, priority="choice")


_POLICIES = {**POLICIES, "none": lambda gate, threshold, context: jnp.zeros(gate.shape, bool)}


def looks_ahead(second_policy: str) -> Leak:
  """Returns "overflow" where there are second choices: first choices are served before them."""
  return leak(1 if second_policy == "none" else 2, "choice")


ROUTER = Router(gshard, looks_ahead)
