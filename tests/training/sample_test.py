"""Sampling is tested with models whose next token is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.training.sample import Window, sample

pytestmark = pytest.mark.unit
V = 7


class Rule(nn.Module):
  """A model whose logits favour the tokens `rule(tokens, segment_ids, positions)` [B, L]."""

  rule: object
  sharpness: float = 50.0

  def __call__(self, tokens, segment_ids, positions, *, train):
    assert not train
    return self.sharpness * jax.nn.one_hot(self.rule(tokens, segment_ids, positions) % V, V), None


def run(rule, prompt, count, *, temperature=1.0, seed=0, sharpness=50.0, **options):
  options = {"window": 4} | options
  return sample(
    Rule(rule, sharpness), {}, prompt, count, jax.random.key(seed), temperature, **options
  )


def successor(tokens, segment_ids, positions):
  return tokens + 1


def test_each_token_follows_the_last_one_also_beyond_the_window():
  # Catches logits that are read one position early or late, and a full window that stops moving.
  assert run(successor, [2], 9).tolist() == [[3, 4, 5, 6, 0, 1, 2, 3, 4]]
  assert run(successor, [0, 0, 0, 0, 0, 4], 3).tolist() == [[5, 6, 0]]


def test_the_window_forgets_the_oldest_token():
  # Catches a window that keeps the prompt's start. The rule copies the first token of the window,
  # which is 4 tokens back.
  def first(tokens, segment_ids, positions):
    return jnp.broadcast_to(tokens[:, :1], tokens.shape)

  assert run(first, [1, 2, 3, 4], 6).tolist() == [[1, 2, 3, 4, 1, 2]]


def test_what_is_not_written_yet_is_padding():
  # Catches a segment id of 1 on the rest of the window, and positions that do not count from 0.
  def used(tokens, segment_ids, positions):
    return jnp.broadcast_to(segment_ids.sum(-1, keepdims=True), tokens.shape)

  assert run(used, [0], 5).tolist() == [[1, 2, 3, 4, 4]]
  assert run(lambda t, s, positions: positions + 3, [0], 5).tolist() == [[3, 4, 5, 6, 6]]


def test_deterministic_in_the_key():
  # Catches a key that is not used, used again for every token or row, or drawn from the clock.
  first = run(successor, [0], 40, sharpness=0.0, rows=2)
  np.testing.assert_array_equal(first, run(successor, [0], 40, sharpness=0.0, rows=2))
  assert (first != run(successor, [0], 40, sharpness=0.0, rows=2, seed=1)).any()
  assert (first[0] != first[1]).any() and len(set(first[0].tolist())) > 3


def test_only_what_is_allowed_is_drawn():
  # Catches special tokens and ids beyond the tokenizer's size in the text. Here 5 and 6 are beyond
  # the end of `allowed`, and 1 is not allowed.
  allowed = np.array([True, False, True, True, True])
  drawn = run(successor, [0], 100, sharpness=0.0, allowed=allowed, rows=3)
  assert set(drawn.ravel().tolist()) == {0, 2, 3, 4}
  greedy = run(successor, [0], 1, temperature=0.0, allowed=allowed)
  assert allowed[greedy[0, 0]]


def test_temperature():
  # Catches logits that are multiplied by the temperature. At sharpness 2 and temperature 0.5 the
  # favoured token has the probability e^4 / (e^4 + 6).
  rows = 4000
  for temperature, expected in ((0.5, np.exp(4) / (np.exp(4) + 6)), (2.0, np.e / (np.e + 6))):
    drawn = run(successor, [0], 1, sharpness=2.0, temperature=temperature, rows=rows)
    assert abs((drawn == 1).mean() - expected) < 4 * (expected * (1 - expected) / rows) ** 0.5
  assert (run(successor, [0], 3, sharpness=0.01, temperature=0.0, rows=5) == [1, 2, 3]).all()


def test_compiles_once():
  # Catches a window that grows, which compiles the model again for each token.
  traces = []
  run(lambda tokens, s, p: traces.append(tokens.shape) or tokens, [1, 2], 6)
  assert traces == [(1, 4)]


def test_bad_input_and_nothing_to_draw():
  # Catches an empty prompt, for which the logits at position -1 would be read.
  with pytest.raises(ValueError, match="prompt"):
    run(successor, [], 1)
  with pytest.raises(ValueError, match="allowed"):
    run(successor, [0], 1, allowed=np.zeros(V, bool))
  assert run(successor, [0], 0, rows=2).shape == (2, 0)


def test_append_leaves_the_old_window_alone():
  # Catches a window that is written in place, so that a branch of the search changes another.
  window = Window.start([1, 2], 4, 1)
  window.append(np.array([3], np.int32))
  assert window.tokens.tolist() == [[1, 2, 0, 0]] and window.length == 2
