"""Models that no machine could hold are refused by arithmetic, and published models are not."""

import pytest
from changed import config

from moe_jax import accounts, assembly
from moe_jax.assembly import sizes
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "changes, field",
  [
    ({"model.moe.num_experts": 2**20, "model.d_model": 2**20}, "model.moe.num_experts"),
    ({"model.d_model": 2**20, "model.d_ff": 2**20, "model.num_layers": 1000}, "model.d_ff"),
    ({"data.seq_len": 2**20, "train.batch_size": 2**12}, "model.num_heads"),
    (
      {"model.vocab_size": 2**24, "train.batch_size": 2**16, "data.seq_len": 2**10},
      "model.vocab_size",
    ),
    (
      {"model.moe.copy_experts": 2**20, "train.batch_size": 2**18, "data.seq_len": 2**10},
      "model.moe.copy_experts",
    ),
    ({"model.moe.group_size": 2**31 - 1, "model.d_model": 2**20}, "model.moe.group_size"),
  ],
)
def test_beyond_any_memory(changes, field):
  # Catches a product that is left to the tracer, which overflows or does not end.
  with pytest.raises(ConfigError, match="smaller") as error:
    assembly.validate(config(changes))
  assert error.value.field == field


@pytest.mark.parametrize(
  "changes, field",
  [
    ({"model.num_layers": 97, "model.scan_layers": False}, "model.scan_layers"),
    ({"model.num_layers": 1000, "model.moe.first": 999, "model.moe.every": 1000}, None),
    ({"model.num_layers": 300, "model.moe.first": 150, "model.moe.every": 1000}, "model.moe.first"),
    ({"model.num_layers": 1000}, None),
    ({"model.num_layers": 96, "model.scan_layers": False}, None),
  ],
)
def test_layers_that_do_not_repeat(changes, field):
  # Catches a model whose layers would be traced one by one for hours, and a deep model that is
  # refused although its layers repeat.
  if not field:
    return assembly.validate(config(changes))
  with pytest.raises(ConfigError, match="(97|151) layers would be compiled one by one") as error:
    assembly.validate(config(changes))
  assert error.value.field == field


@pytest.mark.parametrize(
  "name",
  [
    "switch:c",
    "gshard:1t",
    "lstm_moe:news_131072_h",
    "deepseek_v3:671b",
    "brainformer:8b_64e",
    "t5:xxl",
  ],
)
def test_the_largest_published_models_have_room(name):
  # Catches arithmetic that counts too much, and a limit that refuses the model of a paper.
  from moe_jax.commands import load_config

  c = load_config("configs/" + name.replace(":", ".py:"))
  count = sum(number for _, number in sizes.weights(c.model))
  exact = accounts.parameter_counts(c, 1)[0]
  assert exact / 3 < count <= exact and 100 * 4 * count < sizes.MOST_BYTES
