"""Token choice by sigmoids, balanced by a bias instead of a loss (DeepSeek-V3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.groups import check_groups, limit_to_groups
from moe_jax.routing.options import Count, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import PRIORITIES, leak, select, token_choice


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
  """Each token picks the K experts of highest sigmoid plus bias; the gate knows no bias.

  Paper: DeepSeek-V3 (arXiv 2412.19437) Sec. 2.1.2.

      s = sigmoid(logits),  N(x) = TopM over groups of the sum of the two highest s_i + b_i in the
                            group
      T = TopK(s_i + b_i for i in N(x)),  g_i = s_i / sum_{j in T} s_j,  y = sum_{i in T} g_i(x)
                                          E_i(x)

  Group n holds the E/groups consecutive experts from n*E/groups on; M is `kept_groups`; the paper
  has 8 groups of 32 experts and keeps 4. One group is no limit. Its factor of 2.5 on y is the
  layer's business, and so is b, which rises where an expert has too little to do and falls where it
  has too much. Equal scores of groups go to the lower index, of experts to the larger logit
  (sigmoids of large logits are all 1 in float32) and then to the lower index.

  Reads `context.valid` and `context.bias` (b; none: 0).

  Args:
    logits: router outputs of one group of tokens; float32 arithmetic whatever their dtype.
    context: padding takes no expert: `expert` E and gate 0.
    k: experts a token, in [1, M*E/groups].
    groups: a divisor of E.
    kept_groups: M, in [1, groups].
    gate_norm: what g is. "top_k": as above. At K = 1 that is the constant 1: the task's loss then
      gives the router a gradient of exactly zero. "none": s_i.
    priority: who is served first, see `token_choice`; "gate" orders tokens by s of their first
      choice.

  Returns:
    A plan of A = K*S assignments, gates in [0, 1].

  Raises:
    ConfigError: groups does not divide E; kept_groups or k out of range; unknown gate_norm or
      priority.
  """
  num_experts = logits.shape[-1]
  check_groups("sigmoid_bias", k, groups, kept_groups, num_experts)
  check_name("sigmoid_bias", "gate_norm", gate_norm, _GATE_NORMS)
  check_name("sigmoid_bias", "priority", priority, PRIORITIES)
  log_s = jax.nn.log_sigmoid(logits.astype(jnp.float32))
  if context.bias is None:  # the logarithms have the order of the scores, and do not underflow
    scores, add = log_s, jax.nn.logsumexp
  else:
    scores, add = jnp.exp(log_s) + context.bias, jnp.sum
  # Logits decide between equal scores, because sigmoids of large logits are all 1 in float32.
  expert = select(
    limit_to_groups(scores, groups, kept_groups, best=2, add=add), k, ties=logits
  )  # [S, K]
  gate = _GATE_NORMS[gate_norm](jnp.take_along_axis(log_s, expert, axis=-1))
  first = jax.lax.stop_gradient(jnp.take_along_axis(log_s, expert[:, :1], axis=-1)[:, 0])
  return token_choice(expert, gate, context, num_experts, priority=priority, score=first)


_GATE_NORMS = {  # functions of log s [S, K] of the chosen
  "none": jnp.exp,
  # The softmax of log s_i is s_i / sum_{j in T} s_j, without the division by a sum that may
  # underflow.
  "top_k": lambda log_s: jax.nn.softmax(log_s, axis=-1),
}


ROUTER = Router(sigmoid_bias, leak, reads_bias=True)
