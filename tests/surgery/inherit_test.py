import numpy as np
import pytest
from surgery import models

from moe_jax.errors import ConfigError
from moe_jax.surgery import inherit

pytestmark = pytest.mark.unit


def test_a_student_has_all_weights_but_those_of_other_ffns(tmp_path):
  # Catches a dense FFN of the teacher that is lost, and an expert that becomes a dense FFN.
  sparse = models.Model(
    models.config(tmp_path, model__moe__num_experts=4, model__moe__first=1)
  ).weights
  dense = models.Model(models.config(tmp_path), seed=1).weights
  made = inherit(sparse, dense)
  assert made.keys() == dense.keys()
  for name, array in made.items():
    source = dense if name.startswith("layer_1/ffn/") else sparse
    assert np.array_equal(array, source[name]), name
  narrow = models.Model(models.config(tmp_path, model__d_ff=24), seed=1).weights
  assert np.array_equal(inherit(sparse, narrow)["layer_0/ffn/up"], narrow["layer_0/ffn/up"])


def test_other_differences_are_refused(tmp_path):
  # Catches a student of another width, whose weights would be drawn anew.
  sparse = models.Model(models.config(tmp_path, model__moe__num_experts=4)).weights
  with pytest.raises(ConfigError, match="query_bias"):
    inherit(sparse, models.Model(models.config(tmp_path, model__qkv_bias=True)).weights)
  with pytest.raises(ConfigError, match="layer_1/attention"):
    inherit(sparse, models.Model(models.config(tmp_path, model__num_layers=1)).weights)
