"""Expert choice in which no token gets more than a few experts (Zhou et al. 2022, arXiv 2202.09368,
EC-CAP)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.errors import ConfigError
from moe_jax.routing.options import Count, Divisor, Factor, Iterations, check, slots
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router


def capped_expert_choice(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  capacity_factor: Factor = 2.0,
  max_experts: Count = 2,
  entropy: Divisor = 0.001,
  iterations: Iterations = 100,
) -> RoutingPlan:
  """Each expert picks C = c*S/E tokens such that together they like them best and no token is
  picked too often.

  Paper: Expert Choice (Zhou et al. 2022, arXiv 2202.09368), the capped variant: EC-CAP2 and
  EC-CAP3.

      S = softmax(logits) over experts
      max_A <S^T, A> + lambda H(A)  such that  sum_j A_ij = C for each expert i,  sum_i A_ij <= b
                                               for each token j,
                                               0 <= A <= 1,   H(A) = -sum A log A
      I = TopK(A, C) over tokens,  gate = S at the chosen

  The paper's c, b, lambda are `capacity_factor`, `max_experts`, `entropy`. The maximum is the
  Bregman (KL) projection of exp(S^T / lambda) on the constraints, found by Dykstra's alternating
  projections: see `_project`. Where A reaches its bound 1 its entries are ranked by what they were
  before that bound; then by position.

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: `valid` is read: padding has A = 0; slots that no real token fills name nobody.
    capacity_factor: mean experts a token, > 0; C is rounded and clipped to [1, S].
    max_experts: b, most experts a token, >= 1; from E on it binds nothing, which is plain expert
      choice.
    entropy: lambda, > 0, in units of probability; the smaller, the sharper A and the slower the
      projections.
    iterations: sweeps over the three constraints, >= 1; always as many.

  Returns:
    A plan of A = E*C assignments, expert by expert, largest A first; gates in [0, 1], not
      renormalised.

  Raises:
    ConfigError: capacity_factor, entropy <= 0; max_experts, iterations < 1; max_experts <
      capacity_factor where tokens then have too few places for the experts' slots.

  Deviation: after 100 iterations with the paper's lambda A is not integral yet, and TopK alone
  would put tokens into more than b lists. So no token ever gets more than b: it keeps the b experts
  that it likes best (largest S), and the others list their next tokens that have a place left,
  until no slot can be filled. Where padding, or the rounding of C, leaves fewer than E*C places,
  rows sum to what each expert can get, see `_row_sum`, and slots stay empty.
  """
  num_tokens, num_experts = logits.shape
  _check(num_tokens, num_experts, capacity_factor, max_experts, entropy, iterations)
  capacity = _capacity(num_tokens, num_experts, capacity_factor)
  valid = jnp.ones(num_tokens, bool) if context.valid is None else context.valid
  log_scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).T  # [E, S]
  scores = jnp.exp(log_scores)
  kernel = jnp.where(valid, jax.lax.stop_gradient(scores) / entropy, _NEVER)
  log_a = _project(
    kernel, _row_sum(valid, num_experts, capacity, max_experts), max_experts, iterations
  )
  # Tokens rank experts by the logarithms of S, which do not underflow.
  chosen = _choose(log_a, jax.lax.stop_gradient(log_scores), valid, capacity, max_experts)
  _, token = jax.lax.top_k(jnp.where(chosen, log_a, -jnp.inf), capacity)  # [E, C]
  kept = jnp.take_along_axis(chosen, token, axis=-1)
  expert = jnp.where(kept, jnp.arange(num_experts)[:, None], num_experts)
  gate = jnp.where(kept, jnp.take_along_axis(scores, token, axis=-1), 0.0)
  return RoutingPlan(
    token=token.reshape(-1),
    expert=expert.reshape(-1),
    gate=gate.reshape(-1),  # [E*C]
    num_experts=num_experts,
  )


_NEVER = (
  -1e30
)  # log A of padding: exp of it is 0, and unlike -inf it may be added to and subtracted from


def _project(
  kernel: Float[Array, "E S"], row_sum: Float[Array, ""], max_experts: int, iterations: int
) -> Float[Array, "E S"]:
  """log A after `iterations` sweeps of Dykstra's algorithm from A = exp(kernel), before the last
  cut at A <= 1.

  One sweep projects on the rows' sums, the columns' caps and the bound 1 in turn. A projection
  multiplies A by a factor for each row, column or entry; Dykstra's algorithm takes an inequality's
  last factor back before it projects on it again, and keeps it as its correction. So always log A =
  kernel + rows - columns - entries, and only these are kept (the rows' need no correction: they are
  equations). In the log domain, because kernel goes up to 1/lambda.
  """

  def sweep(_, state):
    _, columns, entries = state
    rows = jnp.log(row_sum) - logsumexp(
      kernel - columns - entries, axis=1, keepdims=True
    )  # sum_j A_ij = C
    columns = jnp.maximum(
      logsumexp(kernel + rows - entries, axis=0) - jnp.log(max_experts), 0.0
    )  # sum_i A_ij <= b
    entries = jnp.maximum(kernel + rows - columns, 0.0)  # A <= 1
    return rows, columns, entries

  num_experts, num_tokens = kernel.shape
  start = jnp.zeros((num_experts, 1)), jnp.zeros(num_tokens), jnp.zeros(kernel.shape)
  rows, columns, _ = jax.lax.fori_loop(0, iterations, sweep, start)
  return kernel + rows - columns


def _row_sum(
  valid: Bool[Array, "S"], num_experts: int, capacity: int, max_experts: int
) -> Float[Array, ""]:
  """C, or what n real tokens allow each expert if that is less: n tokens, and an E-th of their n*b
  places."""
  real = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)
  return jnp.minimum(float(capacity), real * min(1.0, max_experts / num_experts))


def _choose(
  log_a: Float[Array, "E S"],
  scores: Float[Array, "E S"],
  valid: Bool[Array, "S"],
  capacity: int,
  max_experts: int,
) -> Bool[Array, "E S"]:
  """Which expert gets which token: at most `capacity` tokens an expert and `max_experts` experts a
  token.

  In rounds: experts list as many tokens as they have free slots, by A, of those that have a place
  left; tokens keep as many of these as they have places, by S. The first round is the paper's TopK.
  """

  def one_round(state):
    chosen, _ = state
    free = capacity - jnp.sum(chosen, axis=1, keepdims=True)  # [E, 1]
    places = jnp.where(valid, max_experts - jnp.sum(chosen, axis=0), 0)  # [S]
    listed = _among(~chosen & (places > 0), log_a, free, axis=1)
    new = _among(listed, scores, places, axis=0)
    return chosen | new, jnp.any(new)

  start = jnp.zeros(log_a.shape, bool), jnp.array(True)
  return jax.lax.while_loop(lambda state: state[1], one_round, start)[0]


def _among(
  mask: Bool[Array, "E S"], values: Float[Array, "E S"], count: Int[Array, "..."], axis: int
) -> Bool[Array, "E S"]:
  """The `count` largest values along an axis of those in the mask; ties to the lower index."""
  order = jnp.argsort(jnp.where(mask, -values, jnp.inf), axis=axis, stable=True)
  return mask & (jnp.argsort(order, axis=axis) < count)


def _capacity(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
  return slots("capped_expert_choice", capacity_factor, num_tokens, num_experts, "experts a token")


def _check(num_tokens, num_experts, capacity_factor, max_experts, entropy, iterations):
  name = "capped_expert_choice"
  check(name, "max_experts", max_experts, max_experts >= 1, "at least 1 expert a token")
  check(name, "entropy", entropy, entropy > 0, "> 0; the paper's is 0.001")
  check(name, "iterations", iterations, iterations >= 1, "at least 1 sweep")
  slots = num_experts * _capacity(num_tokens, num_experts, capacity_factor)
  if max_experts < capacity_factor and max_experts * num_tokens < slots:
    raise ConfigError(
      f"model.moe.router.{name}.max_experts",
      max_experts,
      f"must be at least capacity_factor={capacity_factor}, or {num_tokens} tokens cannot fill "
      f"{slots} slots",
    )


# A group's tokens compete for the same slots, whatever the capacity.
ROUTER = Router(capped_expert_choice, "yes")
