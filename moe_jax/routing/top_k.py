"""Token choice: every token takes its K most probable experts (GShard, Switch, GLaM, ST-MoE, V-MoE, Mixtral)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.errors import ConfigError
from moe_jax.routing.plan import RoutingContext, RoutingPlan


def top_k(logits: Float[Array, "S E"], context: RoutingContext, *, k: int = 2, gate_norm: str = "top_k",
          priority: str = "choice") -> RoutingPlan:
  """Each token picks its K most probable experts; K = 1 with gate_norm "none" is Switch (sections 2.1 and 2.2).

      p(x) = softmax(logits),  T = TopK(p(x) + b),  y = sum_{i in T} g_i(x) E_i(x)

  Equal scores go to the expert of lower index. Reads `context.valid` and `context.bias` (b, for selection only, as in
  loss-free balancing, arXiv 2408.15664; the gate is never biased).

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: padding takes no expert: `expert` E and gate 0.
    k: experts a token, in [1, E].
    gate_norm: what g is. "none": p_i, out of all E experts (Switch, V-MoE, Qwen1.5-MoE); "top_k": p_i divided by the
      sum over T of p_j (GShard Algorithm 1, ST-MoE appendix G, Mixtral). At K = 1 the latter is the constant 1: the
      task's loss then gives the router a gradient of exactly zero.
    priority: who is served first. "choice": all first choices by position, then all second choices (GShard
      Algorithm 1); "token": all choices of the first token, then those of the second; "gate": as "choice", but tokens
      ordered by the probability of their first choice, which orders all K choices (batch-prioritised routing: V-MoE,
      ST-MoE Table 18).

  Returns:
    A plan of A = K*S assignments, gates in [0, 1].

  Raises:
    ConfigError: k outside [1, E]; unknown gate_norm or priority.

  Deviation: GShard drops a second choice at random with probability 1 - 2 g_2; here none is.
  """
  num_tokens, num_experts = logits.shape
  _check(num_experts, k, gate_norm, priority)
  logits = logits.astype(jnp.float32)
  probs = jax.nn.softmax(logits, axis=-1)
  scores = jax.lax.stop_gradient(probs if context.bias is None else probs + context.bias)
  _, expert = jax.lax.top_k(scores, k)  # [S, K]
  gate = _GATE_NORMS[gate_norm](logits, probs, expert)
  first = jnp.take_along_axis(jax.lax.stop_gradient(probs), expert[:, :1], axis=-1)[:, 0]
  if context.valid is not None:
    expert = jnp.where(context.valid[:, None], expert, num_experts)
    gate = jnp.where(context.valid[:, None], gate, 0.0)
    first = jnp.where(context.valid, first, -1.0)  # padding last
  token, choice = _PRIORITIES[priority](num_tokens, k, first)
  return RoutingPlan(token=token, expert=expert[token, choice], gate=gate[token, choice], num_experts=num_experts)


def looks_ahead(*, priority: str = "choice", **_) -> bool:
  """Whether later tokens change which expert serves an earlier token's first choice: only under priority "gate".

  With K > 1 and priority "choice", a later token's first choice still displaces an earlier token's *second* choice, and
  only where capacity overflows: so it is in GShard and GLaM, and so it is trained here. Priority "token" or no capacity
  limit is strictly causal.
  """
  return priority == "gate"


def _check(num_experts: int, k: int, gate_norm: str, priority: str):
  where = "model.moe.router.top_k"
  if not 1 <= k <= num_experts:
    raise ConfigError(f"{where}.k", k, f"a token takes between 1 and num_experts={num_experts} experts")
  for field, value, table in (("gate_norm", gate_norm, _GATE_NORMS), ("priority", priority, _PRIORITIES)):
    if value not in table:
      raise ConfigError(f"{where}.{field}", value, f"must be one of {', '.join(table)}")


def _gather(values: Float[Array, "S E"], expert: Int[Array, "S K"]) -> Float[Array, "S K"]:
  return jnp.take_along_axis(values, expert, axis=-1)


_GATE_NORMS = {
  "none": lambda logits, probs, expert: _gather(probs, expert),
  # The softmax of the chosen logits is p_i / sum_{j in T} p_j, without the division by a sum that may underflow.
  "top_k": lambda logits, probs, expert: jax.nn.softmax(_gather(logits, expert), axis=-1),
}


def _by_choice(num_tokens: int, k: int, first: Float[Array, "S"]):
  return jnp.tile(jnp.arange(num_tokens), k), jnp.repeat(jnp.arange(k), num_tokens)  # [K*S]


def _by_token(num_tokens: int, k: int, first: Float[Array, "S"]):
  return jnp.repeat(jnp.arange(num_tokens), k), jnp.tile(jnp.arange(k), num_tokens)  # [S*K]


def _by_gate(num_tokens: int, k: int, first: Float[Array, "S"]):
  order = jnp.argsort(-first, stable=True)
  return jnp.tile(order, k), jnp.repeat(jnp.arange(k), num_tokens)  # [K*S]


_PRIORITIES = {"choice": _by_choice, "token": _by_token, "gate": _by_gate}
