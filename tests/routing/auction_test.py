"""Tests the balance, optimality and termination of the auction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import base as oracle
from oracles import compare
from scipy.optimize import linear_sum_assignment

from moe_jax.routing.auction import auction

pytestmark = pytest.mark.numerics


# Most cases share one shape, so that one compilation serves them.
GROUPS, TOKENS, EXPERTS = 50, 64, 8
_auctions = jax.jit(jax.vmap(auction, in_axes=(0, 0, None, None)))


def _assign(values, epsilon=0.01, max_rounds=100_000):
  """Returns the experts [n] for each array [n, E] of values, and the numbers of rounds.

  Each n is at most TOKENS, and values are padded with NaN.
  """
  padded = np.full((GROUPS, TOKENS, EXPERTS), np.nan, np.float32)
  valid = np.zeros((GROUPS, TOKENS), bool)
  for g, one in enumerate(values):
    padded[g, : len(one)], valid[g, : len(one)] = one, True
  expert, rounds = jax.device_get(_auctions(padded, valid, jnp.float32(epsilon), max_rounds))
  assert np.all(expert[~valid] == EXPERTS)
  return [expert[g, : len(one)] for g, one in enumerate(values)], rounds[: len(values)]


def _draw(seed):
  """Returns 50 groups with 24, 29 or 5 tokens.

  They allow 3 tokens per expert, at most 4 (of whose places 3 stay free), and at most 1.
  """
  drawn = compare.draw_logits(seed, GROUPS, 29)
  return [one[: (24, 29, 5)[g % 3]] for g, one in enumerate(drawn)]


def _best_total(values):
  """Returns the best total over the assignments with at most ceil(n/E) tokens per expert."""
  places = -(-len(values) // values.shape[1])
  copies = np.repeat(values, places, axis=1)
  return copies[linear_sum_assignment(copies, maximize=True)].sum()


@pytest.mark.parametrize("epsilon", [0.01, 0.2])
def test_balanced_and_nearly_optimal(epsilon):
  # Catches a greedy choice, bids that ignore the second-best offer, prices that fall, dummies that
  # win a place from tokens, and padding that takes a place, changes the range or a mean, or counts
  # in the number of places.
  liked = 3.0 * np.random.default_rng(0).normal(size=EXPERTS)
  values = [one + liked * (g % 2) for g, one in enumerate(_draw(0))]
  for drawn, expert in zip(values, _assign(values, epsilon)[0], strict=True):
    count, places = np.bincount(expert, minlength=EXPERTS), -(-len(drawn) // EXPERTS)
    assert (
      len(count) == EXPERTS
      and count.max() <= places
      and (len(drawn) % EXPERTS or count.min() == places)
    )
    loss = _best_total(drawn) - drawn[np.arange(len(drawn)), expert].sum()
    assert -1e-3 < loss <= EXPERTS * places * epsilon * np.ptp(drawn)


def test_equals_the_oracle():
  # Values are multiples of 1/64, and the step, which is 1/64 of their range, is a multiple of
  # 2**-12, so float32 is exact here. Catches any other order of bids or ties, prices of experts
  # with free places, and padding that bids.
  values = _draw(1)
  for drawn, expert in zip(values, _assign(values, 1 / 64)[0], strict=True):
    assert expert.tolist() == oracle.auction(np.float64(drawn), 1 / 64)


def test_ends_soon_where_all_want_the_same():
  # The cases are equal logits, the same logits for all tokens, two popular experts and four kinds
  # of tokens. With initial prices of 0 the second case takes hundreds of rounds. Catches a step of
  # 0 if the range is 0, with which the auction would not end, and prices that start at 0.
  rng = np.random.default_rng(3)
  same = np.broadcast_to(rng.normal(size=EXPERTS), (TOKENS, EXPERTS))
  values = [
    np.zeros((TOKENS, EXPERTS)),
    same,
    np.broadcast_to(np.arange(EXPERTS) >= 6, (TOKENS, EXPERTS)),
    rng.normal(size=(4, EXPERTS))[rng.integers(4, size=TOKENS)],
  ]
  expert, rounds = _assign(values)
  assert np.all(rounds[:3] <= EXPERTS) and rounds[3] <= 400
  assert all(np.all(np.bincount(one, minlength=EXPERTS) == 8) for one in expert)


@pytest.mark.parametrize("max_rounds", [0, 2])
def test_the_bound_leaves_nobody_out(max_rounds):
  # Catches tokens without an expert and experts with too many tokens after the last round.
  values = _draw(4)
  expert, rounds = _assign(values, max_rounds=max_rounds)
  assert rounds.max() == max_rounds
  for one in expert:
    assert np.all(one < EXPERTS) and np.bincount(one).max() <= -(-len(one) // EXPERTS)


def test_not_a_number_ends_too():
  # Catches a loop that does not end because comparisons with NaN are False.
  assert _assign([np.full((6, EXPERTS), np.nan)], max_rounds=50)[1] <= 50


def test_greedy_filling_by_hand():
  # The means of both experts are 0, so prices start at 0. Without any round of the auction, tokens
  # 0 to 2 choose expert 0, which takes the first two, and token 3 chooses expert 1, where token 2
  # then gets the last place. The auction finds the maximum, 2 + 3. Catches later tokens that are
  # placed first, a full expert that is chosen again, and an auction that stops too early.
  values = jnp.array([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [-6.0, 0.0]]])
  valid = jnp.ones((1, 4), bool)
  assert _auctions(values, valid, jnp.float32(0.01), 0)[0].tolist() == [[0, 0, 1, 1]]
  assert _auctions(values, valid, jnp.float32(0.01), 100)[0].tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize(("tokens", "experts"), [(6, 1), (1, 4)])
def test_corners(tokens, experts):
  # Catches errors if there is no second-best offer (E = 1), and dummies that take the best expert
  # of a single token.
  values = jnp.asarray(compare.draw_logits(5, 3, tokens, experts, tied=0))
  expert, _ = _auctions(values, jnp.ones((3, tokens), bool), jnp.float32(0.01), 100)
  np.testing.assert_array_equal(expert, values.argmax(axis=-1))
