"""Token choice among the experts of a few devices (DeepSeek-V2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.groups import check_groups, limit_to_groups
from moe_jax.routing.options import Count, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import PRIORITIES, leak, log_odds, select, token_choice


def device_limited(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 6,
  groups: Count = 8,
  kept_groups: Count = 3,
  gate_norm: str = "none",
  priority: str = "choice",
) -> RoutingPlan:
  """Each token picks its K most probable experts on at most M devices, which bounds communication.

  Paper: DeepSeek-V2 (arXiv 2405.04434) Sec. 2.2.2.

      s = softmax(logits),  d(x) = TopM over the D devices of max_{i on device} s_i(x)
      T = TopK(s_i for i on d(x)),  y = sum_{i in T} g_i(x) E_i(x)

  D is `groups`: device d holds the E/D consecutive experts from d*E/D on. M is `kept_groups`, and
  g_i = s_i. Of equal scores of devices the lower index comes first, of experts the larger logit and
  then the lower index. Only the order of scores is limited: where E_i really lies is the mesh's
  business.

  Reads `context.valid` and `context.bias` (added to s to select devices and experts; the gate is
  never biased).

  Args:
    logits: router outputs of one group of tokens; float32 arithmetic whatever their dtype.
    context: padding takes no expert: `expert` E and gate 0.
    k: experts a token, in [1, M*E/D].
    groups: D, a divisor of E.
    kept_groups: M, in [1, D].
    gate_norm: what g is. "none": s_i, out of all E experts (the paper; its factor of 16 is the
      layer's business); "top_k": s_i divided by the sum over T of s_j. At K = 1 the latter is the
      constant 1, without gradient.
    priority: who is served first, see `token_choice`; "gate" orders tokens by the probability of
      their first choice.

  Returns:
    A plan of A = K*S assignments, gates in [0, 1].

  Raises:
    ConfigError: groups does not divide E; kept_groups or k out of range; unknown gate_norm or
      priority.

  Deviation: the bias is not in the paper, and is off where the context has none.
  """
  num_experts = logits.shape[-1]
  check_groups("device_limited", k, groups, kept_groups, num_experts)
  check_name("device_limited", "gate_norm", gate_norm, _GATE_NORMS)
  check_name("device_limited", "priority", priority, PRIORITIES)
  logits = logits.astype(jnp.float32)
  probs = jax.nn.softmax(logits, axis=-1)
  # Without a bias the logits have the order of the scores, of devices too, and do not underflow.
  scores, ties = (logits, None) if context.bias is None else (probs + context.bias, logits)
  expert = select(limit_to_groups(scores, groups, kept_groups, best=1), k, ties)  # [S, K]
  gate = _GATE_NORMS[gate_norm](logits, probs, expert)
  return token_choice(
    expert, gate, context, num_experts, priority=priority, score=log_odds(logits, expert[:, 0])
  )


def _gather(values: Float[Array, "S E"], expert):
  return jnp.take_along_axis(values, expert, axis=-1)


_GATE_NORMS = {
  "none": lambda logits, probs, expert: _gather(probs, expert),
  # The softmax of the chosen logits is s_i / sum_{j in T} s_j, without the division by a sum that
  # may underflow.
  "top_k": lambda logits, probs, expert: jax.nn.softmax(_gather(logits, expert), axis=-1),
}


ROUTER = Router(device_limited, leak, reads_bias=True)
