"""No token left behind: who finds no room at its best expert tries the next (Switch, arXiv
2101.03961, appendix B)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.routing.options import Count, Factor, check, slots
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Leak, Router


def no_token_left_behind(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  choices: Count = 4,
  capacity_factor: Factor = 1.25,
) -> RoutingPlan:
  """Each token goes to its best expert that has room; those that overflow try their second best,
  third best, ...

  Paper: Switch (arXiv 2101.03961) appendix B, "No-Token-Left-Behind".

      p = softmax(logits),  C = capacity_factor * S / E
      round 1: tokens, by position, ask their most probable expert; it serves them while it has one
        of its C slots free
      round i: tokens not yet served, by position, ask their i-th most probable expert in the same
        way
      y = p_e(x) E_e(x),  e: the expert that serves the token

  The paper repeats the rounds; Mesh-TensorFlow's `ntlb_top_k`, 4, is `choices`. Where nothing
  overflows this is Switch. Equal logits go to the expert of lower index. The plan is ordered by
  round, then position, so any dispatcher of capacity C serves exactly what the plan names. C is
  counted over all S rows, padding included, so that it is static.

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: `valid` is read: padding asks nobody and takes no slot.
    choices: rounds, >= 1; more than E are E. 1 is Switch with its overflow already dropped.
    capacity_factor: slots a token, > 0; C is rounded and clipped to [1, S].

  Returns:
    A plan of A = S assignments: one a token; those left behind after all name nobody. Gates are
      p_e, in [0, 1], out of
    all E experts.

  Raises:
    ConfigError: choices < 1, capacity_factor <= 0.
  """
  num_tokens, num_experts = logits.shape
  check(
    "no_token_left_behind", "choices", choices, choices >= 1, "at least 1 expert that a token asks"
  )
  capacity = slots(
    "no_token_left_behind", capacity_factor, num_tokens, num_experts, "slots a token"
  )
  logits = logits.astype(jnp.float32)
  _, ranked = jax.lax.top_k(
    jax.lax.stop_gradient(logits), min(choices, num_experts)
  )  # [S, choices]
  valid = jnp.ones(num_tokens, bool) if context.valid is None else context.valid
  expert, served_in = _serve(ranked, valid, capacity, num_experts)
  token = jnp.argsort(served_in, stable=True)  # by round, then position
  expert = expert[token]
  gate = jax.nn.softmax(logits, axis=-1)[token, jnp.minimum(expert, num_experts - 1)]
  return RoutingPlan(
    token=token,
    expert=expert,
    gate=jnp.where(expert < num_experts, gate, 0.0),
    num_experts=num_experts,
  )


def _serve(
  ranked: Int[Array, "S choices"], valid: Bool[Array, "S"], capacity: int, num_experts: int
) -> tuple[Int[Array, "S"], Int[Array, "S"]]:
  """The expert that serves each token (E: none) and the round, from 0, in which it does (`choices`:
  none)."""

  def one_round(state, named):
    expert, load = state  # [S], [E]: slots taken
    waiting = valid & (expert == num_experts)
    asks = jax.nn.one_hot(
      jnp.where(waiting, named, num_experts), num_experts, dtype=jnp.int32
    )  # [S, E]
    ahead = load + jnp.cumsum(asks, axis=0) - asks  # who is before the token at each expert
    served = asks * (ahead < capacity)
    is_served = jnp.any(served > 0, axis=1)
    return (jnp.where(is_served, named, expert), load + jnp.sum(served, axis=0)), is_served

  num_tokens, rounds = ranked.shape
  nobody = jnp.full(num_tokens, num_experts, ranked.dtype)
  (expert, _), is_served = jax.lax.scan(
    one_round, (nobody, jnp.zeros(num_experts, jnp.int32)), ranked.T
  )
  return expert, jnp.where(jnp.any(is_served, axis=0), jnp.argmax(is_served, axis=0), rounds)


def looks_ahead(choices: int) -> Leak:
  """Returns "overflow" with more than one round.

  Where a token goes that overflows depends on later tokens' first choices. First choices never
  move: they are served by position, before all others.
  """
  return "overflow" if choices > 1 else "no"


ROUTER = Router(no_token_left_behind, looks_ahead)
