"""Token choice that is limited to the experts of a few devices per token (DeepSeek-V2)."""

from __future__ import annotations

from jaxtyping import Array, Float

from moe_jax.routing.groups import check_groups
from moe_jax.routing.options import Count
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.scored_top_k import route
from moe_jax.routing.token_choice import leak, probabilities


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
  """Routes each token to its K most probable experts on at most M devices.

  The limit on the number of devices bounds the communication.

  Paper: DeepSeek-V2 (arXiv 2405.04434) Sec. 2.2.2.

      s = softmax(logits),  d(x) = TopM over the D devices of max_{i on device} s_i(x)
      T = TopK(s_i for i on d(x)),  y = sum_{i in T} g_i(x) E_i(x)

  D is `groups`, and device d holds the E/D consecutive experts that begin with expert d*E/D. M is
  `kept_groups`, and g_i = s_i in the paper. Among devices with equal scores, the lower index comes
  first. Among experts with equal scores, the larger logit comes first, then the lower index. The
  devices are a property of the routing only; the mesh decides where the experts are stored.

  Reads `context.valid` and `context.bias`. The bias is added to s to select devices and experts;
  the gate is never biased.

  Args:
    logits: Router outputs of one group of tokens. They are cast to float32.
    context: Padding gets `expert` E and gate 0.
    k: The number of experts per token, K, in [1, M*E/D].
    groups: The number of devices, D, which must divide E.
    kept_groups: The number of devices that a token may use, M, in [1, D].
    gate_norm: The definition of the gate g. "none": s_i, normalised over all E experts, as in the
      paper (the layer applies the paper's factor of 16). "top_k": s_i divided by the sum of s_j
      over T, which at K = 1 is the constant 1, without gradient.
    priority: The order in which assignments are served, see `token_choice`. "gate" orders tokens by
      the probability of their first choice.

  Returns:
    A plan with A = K*S assignments and gates in [0, 1].

  Raises:
    ConfigError: If groups does not divide E, if kept_groups or k is out of range, or if gate_norm
      or priority is unknown.

  Deviation: the paper has no bias. It has no effect if the context has none.
  """
  check_groups("device_limited", k, groups, kept_groups, logits.shape[-1])
  return route(
    "device_limited",
    logits,
    context,
    k=k,
    score="softmax",
    groups=groups,
    kept_groups=kept_groups,
    group_score="max",
    gate_norm=gate_norm,
    priority=priority,
  )


ROUTER = Router(device_limited, leak, biased=probabilities)
