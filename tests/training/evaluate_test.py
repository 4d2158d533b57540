"""Evaluation over whole validation splits and over several sources."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from moe_jax import data, sharding
from moe_jax.data.options import DataOptions
from moe_jax.layers import Aux
from moe_jax.models.output import token_nats
from moe_jax.training import evaluate
from moe_jax.training.state import TrainState

pytestmark = pytest.mark.unit


class Uniform(nn.Module):
  size: int

  @nn.compact
  def __call__(self, tokens, segment_ids, positions, *, train, targets):
    return token_nats(jnp.zeros((*tokens.shape, self.size)), targets), Aux()


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 4}])
def test_a_uniform_model_costs_log_v_a_target(tmp_path, sizes):
  # Catches bytes of the text that are never a target or are one twice, padding of the last batch
  # that is counted, and sums of one device only.
  options = DataOptions.of(tiny.config(tmp_path).data)
  tokenizer, sources = data.make_tokenizer("bytes"), data.make_sources(options)
  mesh = sharding.make_mesh(sizes)
  eval_fn = evaluate.make_eval(options, 4, {}, Uniform(tokenizer.size), mesh, tokenizer, sources)
  state = TrainState(
    step=jnp.int32(0), params={}, opt_state=(), router_state={}, rng=jax.random.key(0)
  )
  documents = list(sources[0].documents("validation"))
  (total,) = eval_fn(state).values()
  assert total["bytes"] == sum(map(len, documents)) and total["tokens"] == total["bytes"] + len(
    documents
  )
  np.testing.assert_allclose(total["nats"], total["tokens"] * math.log(tokenizer.size), rtol=1e-6)
  (some,) = eval_fn(state, 1).values()
  assert some["tokens"] == 4 * 32


def test_sources_are_averaged_by_bytes():
  # Catches a mean of the sources' values, in which a small source has the weight of a large one.
  # The right value is (10 + 60) / (10 + 30) = 1.75.
  totals = {
    "a": {"nats": 10 * math.log(2), "tokens": 5, "bytes": 10},
    "b": {"nats": 60 * math.log(2), "tokens": 6, "bytes": 30},
    "empty": {"nats": 0.0, "tokens": 0, "bytes": 0},
  }
  result = evaluate.summary(totals)
  assert result["bits_per_byte"] == pytest.approx(1.75)
  assert result["bits_per_byte/b"] == pytest.approx(2.0) and result["loss/b"] == pytest.approx(
    10 * math.log(2)
  )
  assert math.isnan(result["bits_per_byte/empty"])


def test_nats_per_target():
  # One source has 10 nats in 5 targets, and the other one has 60 nats in 6 targets. Catches bits
  # per byte of only a part of the text, and a mean of the sources' means.
  totals = {
    "a": {"nats": 10.0, "tokens": 5, "bytes": 10},
    "b": {"nats": 60.0, "tokens": 6, "bytes": 30},
  }
  result = evaluate.summary(totals, "nats_per_target")
  assert result["nats_per_target"] == pytest.approx(70 / 11) and result[
    "nats_per_target/b"
  ] == pytest.approx(10.0)
  assert not [name for name in result if "bits" in name]


class Source(nn.Module):
  """A uniform model that fails unless it gets the inputs of an encoder."""

  @nn.compact
  def __call__(self, tokens, segment_ids, positions, *, train, encoder, targets):
    assert set(encoder) == {"tokens", "segment_ids", "positions"}
    logits = jnp.zeros((*tokens.shape, 264 + 100)) + 0.0 * encoder["tokens"][:, :1, None]
    return token_nats(logits, targets), Aux()


def test_an_encoder_gets_its_inputs(tmp_path):
  # Catches inputs of the encoder that are not passed on, targets that are missing in the table of
  # byte lengths, and padding that is counted.
  config = tiny.config(tmp_path, data__objective="span_corruption", data__encoder_len=40)
  options, mesh = DataOptions.of(config.data), sharding.make_mesh({"data": 1})
  tokenizer, sources = data.make_tokenizer("bytes"), data.make_sources(options)
  eval_fn = evaluate.make_eval(options, 4, {}, Source(), mesh, tokenizer, sources)
  state = TrainState(
    step=jnp.int32(0), params={}, opt_state=(), router_state={}, rng=jax.random.key(0)
  )
  (total,) = eval_fn(state).values()
  np.testing.assert_allclose(total["nats"] / total["tokens"], math.log(364), rtol=1e-6)
  batches = data.validation_batches(options, tokenizer, sources[0], 4)
  assert (
    total["tokens"] == sum((b["segment_ids"] > 0).sum() for b in batches)
    and 0 < total["bytes"] < total["tokens"]
  )
