"""What is recorded of a model's routing is compared with the model's own plans."""

import jax
import numpy as np
import pytest
import saved_run

import moe_jax
from moe_jax import data, sharding
from moe_jax.data.options import DataOptions
from moe_jax.data.tokenizers import Bytes
from moe_jax.run import routed
from moe_jax.run.evaluate import open_source, placed
from moe_jax.training.step import apply

pytestmark = pytest.mark.smoke


def test_choices_and_probabilities_are_those_of_the_model(tmp_path):
  # Catches choices of another layer or row, a second choice that is the first one, groups of two
  # rows that are taken apart wrongly, and an entropy of gates in place of probabilities.
  place, _ = saved_run.save(
    tmp_path,
    model__num_layers=2,
    model__moe__every=1,
    model__moe__group_rows=2,
    model__moe__router__top_k__k=2,
  )
  run, mesh = moe_jax.load_run(place), sharding.make_mesh({"data": 1})
  options, source = open_source(run.config.data.sources[0], DataOptions.of(run.config.data), "")
  variables = {"params": placed(run, mesh).params}
  batches = routed.routed_batches(
    routed.make_route(run.model, mesh), variables, options, Bytes(), source, 4, 1, mesh
  )
  ((stack, found),) = next(batches).items()
  assert stack == "decoder" and next(batches, None) is None
  assert routed.expert_layers(run.model) == {"decoder": [0, 1]}
  batch = next(data.validation_batches(options, Bytes(), source, 4, 1))
  np.testing.assert_array_equal(found["tokens"], batch["inputs"])

  def metrics_of(variables, batch):
    return apply(run.model, variables, batch, train=False, return_routing=True)[1].metrics

  metrics = jax.jit(metrics_of)(variables, batch)
  plan, p = metrics["plan"], np.asarray(metrics["probabilities"])
  np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(found["entropy"], -(p * np.log(p)).sum(-1), rtol=1e-4)
  np.testing.assert_allclose(found["top"], p.max(-1), rtol=1e-5)
  assert p.shape == (2, 4, 32, 4) and len(found["experts"]) == 4
  # The gates of top-2 routing grow with the probabilities.
  order = np.argsort(-p, axis=-1)
  real = np.broadcast_to(batch["segment_ids"] > 0, order.shape[:3])
  np.testing.assert_array_equal(found["first"][real], order[..., 0][real])
  np.testing.assert_array_equal(found["second"][real], order[..., 1][real])
  assert plan.expert.shape[:2] == (2, 2)


class Words(data.Tokenizer):
  byte_lengths = np.array([0, 4, 4], np.int32)

  def decode(self, ids):
    return b"".join([b"", b" the", b" cat"][i] for i in ids)


class Trims(Words):
  def decode(self, ids):
    return super().decode(ids).strip()


def test_pieces_are_the_text_of_each_token():
  # Catches a curly quote that is shown as three escaped bytes, bytes that are shown as U+FFFD or
  # that join those after a special token, special tokens that are shown as text, and a failure with
  # tokenizers that strip the text that they decode.
  quote = list("“".encode())
  assert routed.pieces(Bytes(), np.array([256, 97, *quote, 10])) == [None, "a", "", "", "“", "\n"]
  assert routed.pieces(Bytes(), np.array([0xC3, 97, 0xC3, 256, 0xA9])) == [
    "",
    "\\xc3a",
    "\\xc3",
    None,
    "\\xa9",
  ]
  assert routed.pieces(Words(), np.array([0, 1, 2])) == [None, " the", " cat"]
  assert routed.pieces(Trims(), np.array([0, 1, 2])) == [None, "the", "cat"]
