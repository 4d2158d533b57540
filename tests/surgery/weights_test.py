import numpy as np
import pytest
from surgery import models

from moe_jax.errors import ConfigError
from moe_jax.surgery import upcycle
from moe_jax.surgery.weights import ffns, is_sparse, roll, unroll

pytestmark = pytest.mark.unit


def test_weights_come_back_whether_layers_are_scanned_or_not(tmp_path):
  # Catches layers in another order, and a scanned layer that gets the weights of another one.
  one = models.Model(models.config(tmp_path, model__scan_layers=True))
  other = models.Model(models.config(tmp_path, model__scan_layers=False))
  assert one.weights.keys() == other.weights.keys()
  again = unroll(roll(one.weights, other.leaves), other.leaves)
  assert all(np.array_equal(again[name], array) for name, array in one.weights.items())
  np.testing.assert_allclose(other.logits(one.weights), one.logits(), rtol=1e-5, atol=1e-5)


def test_ffns_are_found_without_their_shared_experts(tmp_path):
  # Catches the matrices of shared experts that are taken for those of experts.
  sparse = models.Model(
    models.config(tmp_path, model__moe__num_experts=4, model__moe__num_shared_experts=1)
  )
  found = dict(ffns(sparse.weights))
  assert found.keys() == {"layer_0/ffn", "layer_1/ffn"}
  assert all(is_sparse(ffn) and ffn["up"].shape[0] == 4 for ffn in found.values())


def test_models_that_differ_in_more_than_experts_are_refused(tmp_path):
  # Catches weights that are silently drawn anew, or left out.
  dense = models.Model(models.config(tmp_path))

  def sparse(**changes):
    return models.Model(models.config(tmp_path, model__moe__num_experts=4, **changes)).weights

  with pytest.raises(ConfigError, match="query_bias is not in the old model"):
    upcycle(dense.weights, sparse(model__qkv_bias=True))
  with pytest.raises(ConfigError, match="layer_1/.* has no place in the new model"):
    upcycle(dense.weights, sparse(model__num_layers=1))
  with pytest.raises(ConfigError, match="embedding would have the shape"):
    upcycle(dense.weights | {"embedding": np.zeros((3, 16))}, sparse())
  with pytest.raises(ConfigError, match="no dense FFN would become experts"):
    upcycle(dense.weights, dense.weights)
