"""No-Token-Left-Behind routing, which reroutes overflow (Switch, arXiv 2101.03961, appendix B)."""

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
  """Routes each token to the best of its experts that has a free slot.

  Tokens that overflow at their best expert try their second best expert, then the third and so on.

  Paper: Switch (arXiv 2101.03961) appendix B, "No-Token-Left-Behind".

      p = softmax(logits),  C = capacity_factor * S / E
      round 1: tokens, in order of position, ask their most probable expert
               each expert serves the tokens that ask it while it has one of its C slots free
      round i: tokens not yet served ask their i-th most probable expert in the same way
      y = p_e(x) E_e(x),  where e is the expert that serves the token

  The paper repeats the rounds. `choices` is Mesh-TensorFlow's `ntlb_top_k`, whose value is 4. If
  nothing overflows, this is Switch. Among equal logits, the expert with the lower index comes
  first. The plan is ordered by round, then by position, so that any dispatcher with capacity C
  serves all assignments of the plan. C is computed from all S rows, including padding, so that it
  is static.

  Reads `context.valid`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding gets `expert` E and gate 0, and takes no slot.
    choices: The number of rounds, >= 1. Values above E mean E. 1 is Switch with its overflow
      already dropped.
    capacity_factor: The number of slots per token, > 0. C is rounded and clipped to [1, S].

  Returns:
    A plan with A = S assignments, one per token. Tokens that no expert serves have `expert` E. The
    gates are p_e, in [0, 1], normalised over all E experts.

  Raises:
    ConfigError: If choices < 1 or capacity_factor <= 0.
  """
  num_tokens, num_experts = logits.shape
  check(
    "no_token_left_behind", "choices", choices, choices >= 1, "at least 1 expert that a token asks"
  )
  capacity = slots(
    "no_token_left_behind", capacity_factor, num_tokens, num_experts, "slots per token"
  )
  logits = logits.astype(jnp.float32)
  # The experts of each token, best first, [S, choices].
  _, ranked = jax.lax.top_k(jax.lax.stop_gradient(logits), min(choices, num_experts))
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
  """Runs the rounds in which tokens ask experts for a slot.

  Returns:
    (expert, served_in): the expert that serves each token, which is E for none, and the round in
    which it does. Rounds are counted from 0, and `choices` stands for tokens that are not served.
  """

  def one_round(state, candidate):
    expert, load = state  # [S]; [E], the number of slots that are taken
    is_waiting = valid & (expert == num_experts)
    # One-hot vectors [S, E] of the experts that tokens ask. That of index E is all zeros.
    asks = jax.nn.one_hot(
      jnp.where(is_waiting, candidate, num_experts), num_experts, dtype=jnp.int32
    )
    # The number of tokens that come before each token at each expert.
    ahead = load + jnp.cumsum(asks, axis=0) - asks
    served = asks * (ahead < capacity)
    is_served = jnp.any(served > 0, axis=1)
    return (jnp.where(is_served, candidate, expert), load + jnp.sum(served, axis=0)), is_served

  num_tokens, rounds = ranked.shape
  no_expert = jnp.full(num_tokens, num_experts, ranked.dtype)
  (expert, _), is_served = jax.lax.scan(
    one_round, (no_expert, jnp.zeros(num_experts, jnp.int32)), ranked.T
  )
  return expert, jnp.where(jnp.any(is_served, axis=0), jnp.argmax(is_served, axis=0), rounds)


def looks_ahead(choices: int) -> Leak:
  """Returns the `Leak` of `no_token_left_behind`, which is "overflow" with more than one round.

  The expert of a token that overflows depends on the first choices of later tokens. The first
  choices themselves are served by position, before all others, and so do not depend on later
  tokens.
  """
  return "overflow" if choices > 1 else "no"


ROUTER = Router(no_token_left_behind, looks_ahead)
