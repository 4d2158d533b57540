"""The summaries of model and routing that the header of a run shows."""

import pytest
from changed import config

from moe_jax import accounts, assembly

pytestmark = pytest.mark.unit


def _lines(preset, changes=()):
  c = config(changes)
  assembly.use_preset(c, preset)
  return dict(line.strip().split(": ", 1) for line in accounts.routing_summary(c).splitlines())


def test_switch():
  # With S = 256 and E = 8 there are 1.25 * 256 / 8 = 40 slots in training and 64 in evaluation.
  # Catches the capacity of training that is shown for both.
  lines = _lines("switch")
  assert lines["capacity"] == (
    "training: 40 slots per expert (1.25 S/E); evaluation: 64 slots per expert (2 S/E)"
  )
  assert "k=1" in lines["routing"] and "groups of 256 tokens" in lines["routing"]
  assert "jitter 0.01 on its input" in lines["gates"] and lines["causal"].startswith(
    "no later token"
  )
  assert lines["losses"] == "balance 0.01, f counts top_1, per group, P of softmax, sum over layers"


def test_gshard_and_dropless():
  # There are 1.0 * 2 * 256 / 8 = 64 slots. Catches a missing K in S*K/E, and a leak that is shown
  # although nothing is dropped.
  gshard, mixtral = _lines("gshard"), _lines("mixtral")
  assert "64 slots per expert (1 S*K/E)" in gshard["capacity"] and "displaces" in gshard["causal"]
  assert mixtral["capacity"] == "training: dropless; evaluation: dropless"
  assert mixtral["causal"].startswith("no later token")


def test_shared_bias_and_scale():
  lines = _lines("deepseek_v3")
  assert (
    "1 shared" in lines["routing"]
    and "times 2.5" in lines["gates"]
    and "a bias moved by the rule sign" in lines["losses"]
  )
  assert "4 shared behind a sigmoid gate" in _lines("qwen1_5_moe")["routing"]
  assert "tanh gate network" in _lines("llama_moe")["gates"]


def test_experts_without_an_ffn():
  # Catches experts that are not told.
  words = _lines("moe_plus_plus")["routing"]
  assert "8 experts of width 512 and 1 zero, 1 copy and 2 constant experts without an FFN" in words
  assert "512 experts of width 85 and 256 copy experts" in _lines("longcat_flash")["routing"]
  assert "without" not in _lines("mixtral")["routing"]


def test_own_capacity_soft_and_dense():
  # Catches the layer's capacity that is shown for a router with its own, and a crash without
  # experts.
  lines = _lines("switch_no_token_left_behind")
  assert lines["capacity"].startswith("training: 40 slots per expert (1.25 S/E)")
  c = config({"model.moe.allow_noncausal_routing": True})
  assembly.use_preset(c, "soft_moe")
  assert "8 experts of 8 slots" in accounts.routing_summary(c)
  assert accounts.routing_summary(config({"model.moe.num_experts": 0})) == ""


def _model(**changes):
  c = config({key.replace("__", "."): value for key, value in changes.items()})
  return dict(line.strip().split(": ", 1) for line in accounts.model_summary(c).splitlines())


def test_the_model_in_words():
  # Catches experts that count in layers without any, the depth of an encoder in place of the
  # decoder's, and words about another kind of attention or vocabulary.
  lines = _model()
  assert lines["model"] == "decoder, 4 layers of width 128, 2 with experts"
  assert lines["attention"] == "4 heads of 32, 4 of keys and values, rope (theta 10000)"
  assert lines["embedding"] == "the tokenizer's entries, tied to the output projection"
  lines = _model(
    model__family="encoder_decoder",
    model__num_encoder_layers=6,
    model__position="relative",
    model__query_scale=1.0,
    model__moe__extra_ffn=True,
    model__vocab_size=64,
    model__target_vocab_size=32,
    data__seq_len=30,
  )
  assert lines["model"] == "encoder-decoder, 6 + 4 layers of width 128, 5 with experts"
  assert (
    lines["attention"].endswith("relative biases, query scale 1")
    and "64 and 32 entries" in lines["embedding"]
  )
  assert (
    "relative biases, one table per stack"
    in _model(model__position="relative", model__relative_shared=True)["attention"]
  )
  assert "one more before each of the 5 layers' experts" in lines["ffn"]
  assert lines["batch"].startswith("32 rows of 256 tokens to 30,")
  assert "keys and values from 512, full queries" in _model(model__attention="latent")["attention"]
  words = _model(
    model__qk_norm=True,
    model__qk_norm_over="head",
    model__sinks=True,
    model__rotary_dim=16,
    model__sliding_window=8,
    model__global_every=2,
    model__global_positions=False,
  )["attention"]
  assert words.endswith(
    "normalised queries and keys head by head, 16 features rotated, sinks, window of 8, each 2. "
    "layer without window or positions"
  )


def test_where_experts_compute_and_what_the_first_layers_read():
  # Catches words about options that a layer does not have.
  changes = {
    "model.moe.latent_width": 32,
    "model.moe.hash_layers": 1,
    "model.moe.router.name": "scored_top_k",
  }
  words = accounts.routing_summary(config(changes))
  assert "of width 512 in a space of width 32, by hash_top_k in the first 1 of the layers" in words
  assert "space" not in accounts.routing_summary(config())
