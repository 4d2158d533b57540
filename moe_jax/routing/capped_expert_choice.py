"""Expert choice with capped experts per token, EC-CAP (Zhou et al. 2022, arXiv 2202.09368)."""

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
  """Lets each expert pick C = c*S/E tokens, with at most b experts per token.

  Among all such choices it approximates the one with the largest sum of scores.

  Paper: Expert Choice (Zhou et al. 2022, arXiv 2202.09368), the capped variant: EC-CAP2 and
  EC-CAP3.

      S = softmax(logits) over experts
      max_A <S^T, A> + lambda H(A)  such that  sum_j A_ij = C for each expert i,
                                               sum_i A_ij <= b for each token j,
                                               0 <= A <= 1,   H(A) = -sum A log A
      I = TopK(A, C) over tokens,  gate = S at the chosen entries

  The paper's c, b and lambda are `capacity_factor`, `max_experts` and `entropy`. The maximum is the
  Bregman (KL) projection of exp(S^T / lambda) on the constraints. Dykstra's alternating projections
  find it, see `_project`. Entries of A at the bound 1 are ranked by their values before that bound
  was applied, then by position.

  Reads `context.valid`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding has A = 0. Slots that no real token fills name no expert.
    capacity_factor: The mean number of experts per token, c > 0. C is rounded and clipped to
      [1, S].
    max_experts: The largest number of experts per token, b >= 1. If it is at least E, it has no
      effect and the router is plain expert choice.
    entropy: The weight lambda > 0 of the entropy, in units of probability. A smaller value makes A
      sharper and the projections slower to converge.
    iterations: The number of sweeps over the three constraints, >= 1. It is fixed; there is no
      early stop.

  Returns:
    A plan with A = E*C assignments, expert by expert, largest entry of A first. Gates are in [0, 1]
    and not renormalised.

  Raises:
    ConfigError: If capacity_factor or entropy is <= 0, if max_experts or iterations is < 1, or if
      max_experts < capacity_factor and b experts per token cannot fill the slots of all experts.

  Deviation: after 100 iterations with the paper's lambda, A is not integral yet, and TopK alone
  would give some tokens more than b experts. Here no token ever gets more than b: it keeps the b
  experts with its largest S, and the rejected experts pick their next tokens among those with fewer
  than b experts, until no slot can be filled. If padding or the rounding of C leaves fewer than E*C
  places, each row of A sums to what its expert can get, see `_row_sum`, and slots stay empty.
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
  # Tokens rank experts by the logarithm of S, which does not underflow.
  chosen = _choose(log_a, jax.lax.stop_gradient(log_scores), valid, capacity, max_experts)
  _, token = jax.lax.top_k(jnp.where(chosen, log_a, -jnp.inf), capacity)  # [E, C]
  # An expert with fewer than C chosen tokens has slots left over, which stay empty.
  is_filled = jnp.take_along_axis(chosen, token, axis=-1)
  expert = jnp.where(is_filled, jnp.arange(num_experts)[:, None], num_experts)
  gate = jnp.where(is_filled, jnp.take_along_axis(scores, token, axis=-1), 0.0)
  return RoutingPlan(
    token=token.reshape(-1),
    expert=expert.reshape(-1),
    gate=gate.reshape(-1),  # [E*C]
    num_experts=num_experts,
  )


# The value of log A for padding. Its exponential is 0, and unlike -inf it gives no NaN when values
# are added and subtracted.
_NEVER = -1e30


def _project(
  kernel: Float[Array, "E S"], row_sum: Float[Array, ""], max_experts: int, iterations: int
) -> Float[Array, "E S"]:
  """Returns log A after `iterations` sweeps of Dykstra's algorithm from A = exp(kernel).

  One sweep projects A on the sums of rows, the caps of columns and the bound A <= 1 in turn. Each
  projection multiplies A by one factor per row, column or entry. Before Dykstra's algorithm
  projects on an inequality again, it divides A by the last factor of that inequality. Therefore
  log A = kernel + rows - columns - entries at all times, and the state consists of these logarithms
  of factors. Row sums are equations, whose factors need no correction.

  The computation uses logarithms because entries of the kernel are as large as 1/lambda. The result
  does not include the last projection on A <= 1, so that entries at the bound can still be ranked.
  """

  def sweep(_, state):
    _, columns, entries = state
    # sum_j A_ij = C
    rows = jnp.log(row_sum) - logsumexp(kernel - columns - entries, axis=1, keepdims=True)
    # sum_i A_ij <= b
    columns = jnp.maximum(logsumexp(kernel + rows - entries, axis=0) - jnp.log(max_experts), 0.0)
    # A <= 1
    entries = jnp.maximum(kernel + rows - columns, 0.0)
    return rows, columns, entries

  num_experts, num_tokens = kernel.shape
  start = jnp.zeros((num_experts, 1)), jnp.zeros(num_tokens), jnp.zeros(kernel.shape)
  rows, columns, _ = jax.lax.fori_loop(0, iterations, sweep, start)
  return kernel + rows - columns


def _row_sum(
  valid: Bool[Array, "S"], num_experts: int, capacity: int, max_experts: int
) -> Float[Array, ""]:
  """Returns the sum of each row of A, which is C unless there are too few real tokens.

  With n real tokens and n*b places, each expert can get at most n tokens and at most n*b/E places.
  """
  real = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)
  return jnp.minimum(float(capacity), real * min(1.0, max_experts / num_experts))


def _choose(
  log_a: Float[Array, "E S"],
  scores: Float[Array, "E S"],
  valid: Bool[Array, "S"],
  capacity: int,
  max_experts: int,
) -> Bool[Array, "E S"]:
  """Returns True where an expert gets a token, with at most b experts per token.

  In each round, every expert proposes to as many tokens as it has free slots: to those with the
  largest A among the tokens that have a place left. Each token then accepts, in order of S, as many
  proposals as it has places. The first round's proposals are the paper's TopK. The rounds end when
  no token accepts.

  Args:
    log_a: The logarithm of A, by which experts rank tokens.
    scores: The values by which tokens rank experts.
    valid: True for real tokens.
    capacity: The number of slots per expert, C.
    max_experts: The largest number of experts per token, b.
  """

  def one_round(state):
    chosen, _ = state
    free = capacity - jnp.sum(chosen, axis=1, keepdims=True)  # [E, 1]
    places = jnp.where(valid, max_experts - jnp.sum(chosen, axis=0), 0)  # [S]
    proposed = _among(~chosen & (places > 0), log_a, free, axis=1)
    accepted = _among(proposed, scores, places, axis=0)
    return chosen | accepted, jnp.any(accepted)

  start = jnp.zeros(log_a.shape, bool), jnp.array(True)
  return jax.lax.while_loop(lambda state: state[1], one_round, start)[0]


def _among(
  mask: Bool[Array, "E S"], values: Float[Array, "E S"], count: Int[Array, "..."], axis: int
) -> Bool[Array, "E S"]:
  """Returns the mask of the `count` largest values along an axis among those in `mask`.

  Among equal values, the lower index comes first.
  """
  # The argsort of a permutation is its inverse, here the rank of each entry.
  order = jnp.argsort(jnp.where(mask, -values, jnp.inf), axis=axis, stable=True)
  return mask & (jnp.argsort(order, axis=axis) < count)


def _capacity(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
  """Returns the number of slots per expert, C."""
  return slots(
    "capped_expert_choice", capacity_factor, num_tokens, num_experts, "experts per token"
  )


def _check(num_tokens, num_experts, capacity_factor, max_experts, entropy, iterations):
  """Raises ConfigError unless the options are in range and the slots can be filled."""
  name = "capped_expert_choice"
  check(name, "max_experts", max_experts, max_experts >= 1, "at least 1 expert per token")
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


# The tokens of a group compete for the same slots, whatever the dispatcher's capacity.
ROUTER = Router(capped_expert_choice, "yes", competes=True)
