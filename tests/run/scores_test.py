"""Log-likelihoods are compared with sums over whole forward passes of single rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_run
import tiny

from moe_jax.errors import ConfigError
from moe_jax.run.scores import continuations, documents
from moe_jax.run.text_model import text_model

pytestmark = pytest.mark.smoke
# The rows of training have 32 tokens.
PAIRS = [
  ("the expert", " routes a token"),
  ("", "each"),
  ("a  ", "b"),
  ("x" * 50, "what it sees best"),
  ("y", "z" * 40),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A model of random weights, whose capacity would drop tokens."""
  return text_model(
    saved_run.save(tmp_path_factory.mktemp("run"), model__moe__capacity_factor=0.5)[0]
  )


def table(text, tokens):
  """Returns the logarithms of the probabilities after each token."""
  # Causal models do not see the padding, with which all rows have one length.
  ids = jnp.asarray([tokens + [0] * (33 - len(tokens))], jnp.int32)
  places = jnp.arange(33, dtype=jnp.int32)[None]
  apply = tiny.applied(text.model, train=False, dropless=True)
  logits, _ = apply(text.variables, (ids, jnp.ones_like(ids), places), {})
  return np.asarray(jax.nn.log_softmax(logits[0]))[: len(tokens)]


def log_probabilities(text, tokens):
  """Returns log p of each token after the first, and whether it is the most likely one."""
  rows, targets = table(text, tokens)[:-1], np.asarray(tokens[1:])
  return rows[np.arange(len(targets)), targets], rows.argmax(-1) == targets


def expected(text, context, continuation):
  """Returns what `continuations` should return for a pair of texts of bytes."""
  context, continuation = context.rstrip(), context[len(context.rstrip()) :] + continuation
  tokens = [256, *(context + continuation).encode()][-33:]
  scored = min(len(continuation), len(tokens) - 1)
  scores, is_greedy = log_probabilities(text, tokens)
  return scores[-scored:].sum(), is_greedy[-scored:].all()


def test_continuations(text):
  # Catches a score of the context, a row that is shifted by one, results in the order of lengths, a
  # text that is cut on the wrong side, and padding that takes slots.
  scores = continuations(text, PAIRS, batch_size=2)
  for score, pair in zip(scores, PAIRS, strict=True):
    np.testing.assert_allclose(score[0], expected(text, *pair)[0], rtol=1e-5)
    assert score[1] == expected(text, *pair)[1]
  # Of all bytes, only the most likely one is what greedy decoding gives.
  last = table(text, [256, *b"the"])[-1]
  best = int(np.argmax(last[:128]))
  ((_, is_greedy),) = continuations(text, [("the", chr(best))])
  assert is_greedy == (best == int(np.argmax(last)))


def test_documents(text):
  # Catches a token that is scored twice or never where a row ends, and the end of the document,
  # which is not scored.
  long = "the expert routes a token to one of many networks"
  scores = documents(text, ["short", long], batch_size=2)
  ids = [256, *long.encode()]
  parts = [log_probabilities(text, ids[start : start + 33])[0].sum() for start in (0, 32)]
  np.testing.assert_allclose(scores[1], sum(parts), rtol=1e-5)
  np.testing.assert_allclose(
    scores[0], log_probabilities(text, [256, *b"short"])[0].sum(), rtol=1e-5
  )


def test_mistakes_are_one_sentence(text, tmp_path):
  # Catches a score of nothing, which would be certain, and an encoder that reads no source.
  with pytest.raises(ConfigError, match="continuation"):
    continuations(text, [("a", "")])
  place, _ = saved_run.save(
    tmp_path, model__family="encoder_decoder", data__objective="span_corruption"
  )
  with pytest.raises(ConfigError, match="next_token"):
    documents(text_model(place), ["a"])
