"""Balanced linear assignment of tokens to experts by Bertsekas' auction algorithm."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def auction(
  values: Float[Array, "S E"],
  valid: Bool[Array, "S"],
  epsilon: float | Float[Array, ""],
  max_rounds: int | Int[Array, ""],
) -> tuple[Int[Array, "S"], Int[Array, ""]]:
  """Assigns an expert to each real token such that the total value is nearly maximal.

  With n real tokens, each expert gets at most C = ceil(n/E) tokens. E*C - n places remain, which
  are filled by as many dummy tokens, to which all experts are worth 0. In each round, all tokens
  without an expert bid for the expert that is worth most to them (the Jacobi form of the auction):

      bid of i = a_ij - w_i + step,  j = argmax (a_i - p),  w_i = max_{k != j} (a_ik - p_k)

  Expert j keeps the C highest of its old and new bids. Once it is full, its price p_j is the lowest
  bid that it keeps. At the end, the net value a_ij - p_j of each token's expert is within `step` of
  the best net value at the final prices. By duality, the total value is then within E*C*step of the
  maximum. Each price starts at the mean over tokens of the expert's values. The bound allows any
  initial prices, because all places are filled in the end. If prices started at 0, tokens that all
  prefer the same experts would bid against each other for up to E/epsilon rounds.

  If tokens remain after `max_rounds` rounds, they take, in order of position, their best expert
  among those with free places. Every token then has an expert, and each expert still has at most C
  tokens, but the bound on the total no longer holds. Among equal net values, the expert with the
  lower index wins; among equal bids, the earlier token.

  Args:
    values: The value a of each expert to each token, float32.
    valid: True for real tokens. The other tokens take no part.
    epsilon: The increment of bids relative to the range of values over real tokens, step / (max a -
      min a), > 0.
    max_rounds: The largest number of rounds of the auction.

  Returns:
    (expert, rounds): the expert of each token, which is E for tokens that are not real, and the
    number of rounds of the auction. Neither carries gradient.
  """
  num_tokens, num_experts = values.shape
  capacity = -(-jnp.sum(valid) // num_experts)  # rounded up
  values, is_bidder, step = _add_dummies(jax.lax.stop_gradient(values), valid, capacity, epsilon)

  def bid(state):
    expert, bids, price, rounds = state
    offers = values - price
    best = jnp.argmax(offers, axis=-1)
    is_best = jnp.arange(num_experts) == best[:, None]
    second = jnp.max(jnp.where(is_best, -jnp.inf, offers), axis=-1)
    new_bids = jnp.take_along_axis(values, best[:, None], axis=-1)[:, 0] - second + step
    is_free = is_bidder & (expert == num_experts)
    return *_keep_highest_bids(
      jnp.where(is_free, best, expert), jnp.where(is_free, new_bids, bids), capacity, num_experts
    ), rounds + 1

  def fill(state):
    expert, *_, rounds = state
    # `bincount` ignores indices that are out of bounds, such as E of a token without an expert.
    is_full = jnp.bincount(expert, length=num_experts) >= capacity
    is_free = is_bidder & (expert == num_experts)
    expert = jnp.where(is_free, jnp.argmax(jnp.where(is_full, -jnp.inf, values), axis=-1), expert)
    # Tokens that already have an expert bid 1 and the others 0, so that nobody loses a place.
    return *_keep_highest_bids(
      expert, jnp.where(is_free, 0.0, 1.0), capacity, num_experts
    ), rounds + 1

  def not_done(limit):
    return lambda state: (state[-1] < limit) & jnp.any(is_bidder & (state[0] == num_experts))

  num_bidders = len(is_bidder)
  state = (jnp.full(num_bidders, num_experts), jnp.zeros(num_bidders), jnp.zeros(num_experts), 0)
  state = jax.lax.while_loop(not_done(max_rounds), bid, state)
  rounds = cast(Array, state[-1])  # `while_loop` has made an array of the 0
  # Each round of `fill` places all remaining tokens or fills an expert, so E rounds suffice.
  expert, *_ = jax.lax.while_loop(not_done(rounds + num_experts), fill, state)
  return expert[:num_tokens], rounds


def _add_dummies(values, valid, capacity, epsilon):
  """Appends dummy tokens and subtracts the initial prices from the values.

  Returns:
    (values, is_bidder, step). The first two have E - 1 rows more than the input, because that is
    the largest number of dummies. Rows of padding and of dummies that are not needed do not bid.
  """
  num_experts, count = values.shape[-1], jnp.sum(valid)
  real = valid[:, None]
  spread = jnp.max(jnp.where(real, values, -jnp.inf)) - jnp.min(jnp.where(real, values, jnp.inf))
  # A step of 0 would leave prices unchanged for ever.
  step = epsilon * jnp.where(spread > 0, spread, 1.0)
  mean = jnp.sum(jnp.where(real, values, 0.0), axis=0) / jnp.maximum(count, 1)
  # Initial prices are multiples of the step, so that the order of summation does not matter.
  start = jnp.round(mean / step) * step
  is_dummy = jnp.arange(num_experts - 1) < num_experts * capacity - count
  values = jnp.concatenate([values, jnp.zeros((num_experts - 1, num_experts))])
  return values - start, jnp.concatenate([valid, is_dummy]), step


def _keep_highest_bids(expert, bids, capacity, num_experts):
  """Keeps the `capacity` highest bids of each expert.

  Returns:
    (expert, bids, price): the expert of each token, which is E if its bid was not kept; the bids,
    unchanged; and the price of each expert, which is its lowest bid if it is full and 0 otherwise.
  """
  positions = jnp.arange(len(expert))
  order = jnp.lexsort((-bids, expert))  # by expert, then from the highest bid, then by position
  count = jnp.bincount(expert, length=num_experts)
  first = jnp.cumsum(count) - count
  # The rank of each bid among the bids for the same expert. It has no meaning for expert E, for
  # which `first` is extended by an arbitrary 0.
  rank = positions - jnp.append(first, 0)[expert[order]]
  is_kept = jnp.zeros(len(expert), bool).at[order].set(rank < capacity)
  lowest = bids[order[jnp.clip(first + capacity - 1, 0, len(expert) - 1)]]
  return jnp.where(is_kept, expert, num_experts), bids, jnp.where(count >= capacity, lowest, 0.0)
