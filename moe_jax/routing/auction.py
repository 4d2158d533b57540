"""Balanced linear assignment of tokens to experts by auction (Bertsekas)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def auction(
  values: Float[Array, "S E"],
  valid: Bool[Array, "S"],
  epsilon: float | Float[Array, ""],
  max_rounds: int | Int[Array, ""],
) -> tuple[Int[Array, "S"], Int[Array, ""]]:
  """An expert for each real token, at most C = ceil(n/E) tokens an expert; the total value is
  nearly the largest.

  With n real tokens, E*C - n places stay empty: as many dummies, to whom all experts are worth 0,
  take them. In each round all who have no expert bid for the one that is worth most to them (Jacobi
  form):

      bid of i = a_ij - w_i + step,  j = argmax (a_i - p),  w_i = max_{k != j} (a_ik - p_k)

  Expert j keeps its C highest bids, old and new; once it is full, its price p_j is the lowest of
  them. At the end each is within `step` of his best offer at the final prices, so the total is
  within E*C*step of the largest, by duality. Prices start at the mean over tokens of an expert's
  values, which the bound allows because all places get taken; from 0, tokens that all like the same
  experts would bid against each other for up to E/epsilon rounds.

  After `max_rounds` the auction stops all the same. Then those without an expert take their best
  offer among experts with free places, the earlier token first: nobody is left out, and each expert
  still gets at most C; only the bound on the total is lost. Equal offers: the lower expert; equal
  bids: the earlier token.

  Args:
    values: a, float32.
    valid: which tokens are real; the others take no part.
    epsilon: step / (max a - min a) over real tokens, > 0.
    max_rounds: of the auction.

  Returns:
    (expert of each token, E for those that are not real; number of rounds of the auction), without
      gradient.
  """
  num_tokens, num_experts = values.shape
  capacity = -(-jnp.sum(valid) // num_experts)
  values, here, step = _everybody(jax.lax.stop_gradient(values), valid, capacity, epsilon)

  def bid(state):
    expert, bids, price, rounds = state
    offers = values - price
    best = jnp.argmax(offers, axis=-1)
    is_best = jnp.arange(num_experts) == best[:, None]
    second = jnp.max(jnp.where(is_best, -jnp.inf, offers), axis=-1)
    new = jnp.take_along_axis(values, best[:, None], axis=-1)[:, 0] - second + step
    free = here & (expert == num_experts)
    return *_keep(
      jnp.where(free, best, expert), jnp.where(free, new, bids), capacity, num_experts
    ), rounds + 1

  def fill(state):
    expert, *_, rounds = state
    full = (
      jnp.bincount(expert, length=num_experts) >= capacity
    )  # who is nowhere (E) falls off the end
    free = here & (expert == num_experts)
    expert = jnp.where(free, jnp.argmax(jnp.where(full, -jnp.inf, values), axis=-1), expert)
    return *_keep(expert, jnp.where(free, 0.0, 1.0), capacity, num_experts), rounds + 1

  def until(limit):
    return lambda state: (state[-1] < limit) & jnp.any(here & (state[0] == num_experts))

  state = (jnp.full(len(here), num_experts), jnp.zeros(len(here)), jnp.zeros(num_experts), 0)
  state = jax.lax.while_loop(until(max_rounds), bid, state)
  rounds = state[-1]
  expert, *_ = jax.lax.while_loop(
    until(rounds + num_experts), fill, state
  )  # each round seats all or fills an expert
  return expert[:num_tokens], rounds


def _everybody(values, valid, capacity, epsilon):
  """(values above the starting prices, who takes part, step), of the tokens and then of room for E
  - 1 dummies."""
  num_experts, count = values.shape[-1], jnp.sum(valid)
  real = valid[:, None]
  spread = jnp.max(jnp.where(real, values, -jnp.inf)) - jnp.min(jnp.where(real, values, jnp.inf))
  step = epsilon * jnp.where(spread > 0, spread, 1.0)  # never 0, or prices would stand still
  mean = jnp.sum(jnp.where(real, values, 0.0), axis=0) / jnp.maximum(count, 1)
  start = (
    jnp.round(mean / step) * step
  )  # in whole steps, so that the order of summation does not matter
  is_dummy = jnp.arange(num_experts - 1) < num_experts * capacity - count
  values = jnp.concatenate([values, jnp.zeros((num_experts - 1, num_experts))])
  return values - start, jnp.concatenate([valid, is_dummy]), step


def _keep(expert, bids, capacity, num_experts):
  """Each expert keeps its `capacity` highest bids: (expert or E, bids, the lowest bid of a full
  expert or 0)."""
  places = jnp.arange(len(expert))
  order = jnp.lexsort((-bids, expert))  # by expert, then from the highest bid, then by position
  count = jnp.bincount(expert, length=num_experts)
  first = jnp.cumsum(count) - count
  rank = (
    places - jnp.append(first, 0)[expert[order]]
  )  # among the bids for the same expert; of no matter at E
  kept = jnp.zeros(len(expert), bool).at[order].set(rank < capacity)
  lowest = bids[order[jnp.clip(first + capacity - 1, 0, len(expert) - 1)]]
  return jnp.where(kept, expert, num_experts), bids, jnp.where(count >= capacity, lowest, 0.0)
