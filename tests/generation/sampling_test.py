"""The filters of sampling are tested on logits that a reader can sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.generation.sampling import Sampling, draw

pytestmark = pytest.mark.unit
# Probabilities 0.1, 0.4, 0.2 and 0.3.
LOGITS = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))


def shares(**options):
  """Returns how often each token is drawn."""
  rows = jnp.tile(LOGITS, (4000, 1))
  tokens = draw(jax.random.key(0), rows, Sampling(**({"temperature": 1.0} | options)))
  return np.bincount(np.asarray(tokens), minlength=4) / len(rows)


@pytest.mark.parametrize(
  "options, expected",
  [
    ({}, [0.1, 0.4, 0.2, 0.3]),
    ({"temperature": 0.0}, [0, 1, 0, 0]),
    ({"temperature": 0.5}, np.asarray([1, 16, 4, 9]) / 30),
    ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
    # 0.4 and 0.3 do not reach 0.75, so 0.2 belongs to the nucleus, too.
    ({"top_p": 0.75}, np.asarray([0, 4, 2, 3]) / 9),
    ({"top_p": 0.01}, [0, 1, 0, 0]),
    # Of the two that top_k leaves, 0.4 is 4/7 of the probability, which reaches 0.5.
    ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
  ],
)
def test_shares_of_tokens(options, expected):
  # Catches a temperature that multiplies, a nucleus that leaves out the token that completes it or
  # that is applied before top_k, and filters that are off by one.
  np.testing.assert_allclose(shares(**options), expected, atol=0.03)


def test_allowed_tokens_and_keys():
  # Catches a mask on the wrong side, tokens beyond it, and rows that draw the same noise.
  allowed = jnp.asarray([True, False, True])
  assert draw(jax.random.key(0), LOGITS, Sampling(), allowed).tolist() == [2]
  rows = draw(jax.random.key(0), jnp.zeros((2, 100)), Sampling(temperature=1.0))
  assert rows[0] != rows[1]


@pytest.mark.parametrize(
  "options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}]
)
def test_values_out_of_range(options):
  # Catches a range that is not checked, whose sampling would have no meaning.
  with pytest.raises(ConfigError, match=next(iter(options))):
    Sampling(**options)
