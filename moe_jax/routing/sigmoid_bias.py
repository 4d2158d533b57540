"""Token choice by sigmoid scores, which a bias balances instead of a loss (DeepSeek-V3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.groups import check_groups
from moe_jax.routing.options import Count
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.scored_top_k import route
from moe_jax.routing.token_choice import leak


def sigmoid_bias(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 8,
  groups: Count = 1,
  kept_groups: Count = 1,
  gate_norm: str = "top_k",
  priority: str = "choice",
) -> RoutingPlan:
  """Routes each token to the K experts with the highest sum of sigmoid score and bias.

  The bias does not enter the gates.

  Paper: DeepSeek-V3 (arXiv 2412.19437) Sec. 2.1.2.

      s = sigmoid(logits)
      N(x) = TopM over groups of the sum of the two highest s_i + b_i in the group
      T = TopK(s_i + b_i for i in N(x)),  g_i = s_i / sum_{j in T} s_j
      y = sum_{i in T} g_i(x) E_i(x)

  Group n holds the E/groups consecutive experts that begin with expert n*E/groups. M is
  `kept_groups`. The paper has 8 groups of 32 experts and keeps 4. With one group there is no limit.
  The layer applies the paper's factor of 2.5 on y. The router does not update b; load balancing
  raises it for experts with too few tokens and lowers it for experts with too many. Among groups
  with equal scores, the lower index comes first. Among experts with equal scores, the larger logit
  comes first (sigmoids of large logits are all 1 in float32), then the lower index.

  Reads `context.valid` and `context.bias`. The latter is b, and None stands for 0.

  Args:
    logits: Router outputs of one group of tokens. They are cast to float32.
    context: Padding gets `expert` E and gate 0.
    k: The number of experts per token, K, in [1, M*E/groups].
    groups: The number of groups of experts, which must divide E.
    kept_groups: The number of groups that a token may use, M, in [1, groups].
    gate_norm: The definition of the gate g. "top_k": as in the equations above. At K = 1 that is
      the constant 1, so that the gradient of the task's loss with respect to the router is exactly
      zero. "none": s_i.
    priority: The order in which assignments are served, see `token_choice`. "gate" orders tokens by
      s of their first choice.

  Returns:
    A plan with A = K*S assignments and gates in [0, 1].

  Raises:
    ConfigError: If groups does not divide E, if kept_groups or k is out of range, or if gate_norm
      or priority is unknown.
  """
  check_groups("sigmoid_bias", k, groups, kept_groups, logits.shape[-1])
  return route(
    "sigmoid_bias",
    logits,
    context,
    k=k,
    score="sigmoid",
    groups=groups,
    kept_groups=kept_groups,
    group_score="top_2_sum",
    gate_norm=gate_norm,
    priority=priority,
  )


def sigmoids(logits: Float[Array, "*N E"], **_: object) -> Float[Array, "*N E"]:
  """Returns the scores to which the router adds the bias."""
  return jax.nn.sigmoid(logits.astype(jnp.float32))


ROUTER = Router(sigmoid_bias, leak, biased=sigmoids)
