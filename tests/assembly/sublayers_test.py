"""The text of a Brainformer's block decides which values its sublayers read."""

import pytest
from changed import config

from moe_jax.assembly import sublayers

pytestmark = pytest.mark.unit

MOE = "moe:gate=top_2,hidden=96,capacity=1.5"


def test_text_and_back():
  # Catches numbers that stay text, and an option that is lost on the way.
  assert sublayers.kind("ffn") == "ffn" and sublayers.options("ffn") == {}
  assert sublayers.options(MOE) == {"gate": "top_2", "hidden": 96, "capacity": 1.5}
  for text in ("attention", "attention:width=64,heads=2", MOE):
    assert sublayers.write(sublayers.kind(text), sublayers.options(text)) == text


def _model(block, **changes):
  return config(
    {"model.family": "brainformer", "model.block": block, "model.num_layers": 2}
    | {key.replace("__", "."): value for key, value in changes.items()}
  ).model


def test_what_a_sublayer_reads():
  # Catches a key that is not replaced, or is replaced in the config that all sublayers share, and a
  # capacity that a router with its own capacity factor ignores.
  m = _model(
    (
      "attention:width=96,heads=6",
      MOE,
      "moe:gate=expert_choice,capacity=3",
      "moe:activation=reglu",
      "ffn",
    ),
    model__num_kv_heads=2,
    model__moe__capacity_basis="assignments",
  )
  attention, top_2, chosen, plain, ffn = sublayers.own_models(m).values()
  assert (attention.d_model, attention.num_heads, attention.num_kv_heads) == (96, 6, 3)
  assert (top_2.moe.router.name, top_2.moe.d_ff, top_2.moe.capacity_factor) == ("gshard", 96, 1.5)
  assert top_2.moe.capacity_basis == "assignments"
  assert (chosen.moe.router.expert_choice.capacity_factor, chosen.moe.capacity_factor) == (
    3.0,
    None,
  )
  assert (plain.moe.activation, plain.moe.router.name, plain.activation) == (
    "reglu",
    "top_k",
    "swiglu",
  )
  assert ffn.to_dict() == m.to_dict() and m.moe.router.expert_choice.capacity_factor == 2.0


def test_whose_parameter():
  # The block consists of a prefix and twice "moe:hidden=8", "ffn". There is one block, and the scan
  # begins at sublayer 1. Catches an index in the scan that is taken for an index in the model.
  m = _model(("attention", "moe:hidden=8", "ffn", "moe:hidden=8", "ffn"))
  m.num_layers = 1

  def at(*path):
    return sublayers.sublayer_at(m, path)

  assert (
    at("repeats", "layer_0", "ffn", "up") == "moe:hidden=8"
    and at("repeats", "layer_1", "ffn", "up") == "ffn"
  )
  assert at("layer_0", "attention", "query") == "attention"
  assert sublayers.sublayer_at(config().model, ("repeats", "layer_1", "ffn", "up")) == ""
