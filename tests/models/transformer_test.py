"""Tests which parts a layer of a Transformer gets; stack_test.py tests what it does with them."""

import functools

import pytest
from flax import linen as nn

from moe_jax.models.transformer import transformer_block

pytestmark = pytest.mark.unit


class Part(nn.Module):
  what: str


def parts(has_experts, remat="none", **options):
  """Returns the name of the layer's class, and the name of each of its parts."""
  make = {
    name: functools.partial(Part, name) for name in ("attention", "dense", "moe", "norm", "cross")
  }
  block = transformer_block(has_experts, False, remat=remat, **make | options)
  fields = {
    name: part and part().what
    for name, part in block.keywords.items()
    if name not in ("dropout", "norm")
  }
  return block.func.__name__, fields


def test_experts_take_the_place_of_the_dense_ffn():
  # Catches experts in every layer or in none, and an extra FFN in layers without experts.
  dense = {"attention": "attention", "cross": "cross", "ffn": "dense", "extra": None}
  assert parts(False, extra_ffn=True) == ("Block", dense)
  assert parts(True) == ("Block", dense | {"ffn": "moe"})
  assert parts(True, extra_ffn=True) == ("Block", dense | {"ffn": "moe", "extra": "dense"})
  assert parts(False, cross=None) == ("Block", dense | {"cross": None})


def test_global_layers_have_an_attention_of_their_own():
  # Catches kinds whose two parts are swapped.
  every = functools.partial(Part, "everything")
  fields = parts((True, False), global_attention=every)[1]
  assert (fields["attention"], fields["ffn"]) == ("attention", "moe")
  fields = parts((False, True), global_attention=every)[1]
  assert (fields["attention"], fields["ffn"]) == ("everything", "dense")


def test_layers_by_hash():
  # Catches a layer that gets the other router.
  hashed = functools.partial(Part, "hashed")
  assert parts("hash", hash_moe=hashed)[1]["ffn"] == "hashed"
  assert parts(True, hash_moe=hashed)[1]["ffn"] == "moe"


def test_remat_wraps_the_block():
  # Catches a `remat` that is not read.
  assert parts(True, remat="full")[0] != "Block"
