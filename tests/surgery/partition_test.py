import numpy as np
import pytest
from surgery import models

from moe_jax.errors import ConfigError
from moe_jax.surgery import partition
from moe_jax.surgery.partition import METHODS

pytestmark = pytest.mark.numerics

# The dense FFN has 32 hidden units.
SPARSE = {
  "model__moe__num_experts": 4,
  "model__moe__d_ff": 8,
  "model__moe__router__top_k__k": 4,
  "model__moe__routed_scale": 4.0,
}
SHARED = {
  "model__moe__num_experts": 3,
  "model__moe__num_shared_experts": 1,
  "model__moe__d_ff": 8,
  "model__moe__router__top_k__k": 3,
  "model__moe__routed_scale": 3.0,
}
PATHS = ("layer_0/ffn", "layer_1/ffn")


def importance(clusters):
  """Returns an importance by which each cluster needs other units, and all need the first eight."""
  own = np.zeros((clusters, 32))
  for c in range(clusters):
    own[c, 8 * c : 8 * c + 8] = 1 + np.arange(8) / 8
  return {path: own + 100 * (np.arange(32) < 8) * (clusters == 3) for path in PATHS}


@pytest.mark.parametrize("method", METHODS)
def test_all_experts_together_are_the_dense_ffn(tmp_path, method):
  # Catches units that are in no expert or in two, matrices of an expert with other units, and
  # shared units that are counted among the routed ones.
  changes = SHARED if method == "inter" else SPARSE
  dense = models.Model(models.config(tmp_path))
  sparse = models.Model(models.config(tmp_path, **changes), seed=1)
  clusters = changes["model__moe__num_experts"]
  made = partition(dense.weights, sparse.weights, method=method, importance=importance(clusters))
  # With equal logits all gates are 1/N, which `routed_scale` = N undoes.
  for path in PATHS:
    made[f"{path}/router"] = np.zeros_like(made[f"{path}/router"])
  np.testing.assert_allclose(sparse.logits(made), dense.logits(), rtol=1e-4, atol=1e-5)


def units(made, dense, path="layer_0/ffn"):
  """Returns the hidden units of each expert, found by their columns of `up`."""
  columns = dense[f"{path}/up"].T
  return [
    sorted(int(np.flatnonzero((columns == column).all(axis=1))[0]) for column in expert.T)
    for expert in made[f"{path}/up"]
  ]


def test_each_expert_takes_the_units_of_its_cluster(tmp_path):
  # Catches clusters that are exchanged, and units that cannot be in two experts.
  dense = models.Model(models.config(tmp_path)).weights
  sparse = models.Model(models.config(tmp_path, **SPARSE)).weights
  made = partition(dense, sparse, method="inner", importance=importance(4))
  assert units(made, dense) == [list(range(8 * c, 8 * c + 8)) for c in range(4)]
  same = {path: np.tile(np.arange(32.0), (4, 1)) for path in PATHS}
  made = partition(dense, sparse, method="inner", importance=same)
  assert units(made, dense) == [list(range(24, 32))] * 4


def test_units_that_matter_everywhere_are_shared(tmp_path):
  # Catches units that matter much for one cluster only, which should be routed.
  dense = models.Model(models.config(tmp_path)).weights
  sparse = models.Model(models.config(tmp_path, **SHARED)).weights
  found = importance(3)
  for values in found.values():
    values[0, 31] = 1e6
  made = partition(dense, sparse, method="inter", importance=found)
  shared = made["layer_0/ffn/shared/up"]
  # Unit 31 is one of the eight for one cluster, and the units 0 to 7 for two or three.
  assert np.array_equal(shared, dense["layer_0/ffn/up"][:, :8])
  assert sorted(sum(units(made, dense), [])) == list(range(8, 32))


def test_similar_units_go_to_the_same_expert(tmp_path):
  # Catches k-means of something else than the directions of the columns of `up`.
  dense = models.Model(models.config(tmp_path)).weights
  sparse = models.Model(models.config(tmp_path, **SPARSE)).weights
  rng = np.random.default_rng(0)
  kind = rng.permutation(np.repeat(np.arange(4), 8))
  scale = rng.uniform(0.1, 10, 32)
  for path in PATHS:
    directions = np.eye(16)[kind] + 0.01 * rng.normal(size=(32, 16))
    dense[f"{path}/up"] = (scale[:, None] * directions).T
  made = partition(dense, sparse, method="clustering")
  assert sorted(units(made, dense)) == sorted(np.flatnonzero(kind == c).tolist() for c in range(4))


@pytest.mark.parametrize(
  "changes, options, words",
  [
    ({"model__moe__d_ff": 12}, {"method": "random"}, "hold 48 hidden units.*d_ff=8"),
    ({}, {"method": "inter"}, "num_shared_experts=1"),
    (SHARED, {"method": "random"}, "num_shared_experts=0"),
    ({}, {"method": "inner"}, "needs the importance of its 32"),
    ({}, {"method": "inner", "importance": importance(3)}, "each of the 4 experts"),
    ({}, {"method": "luck"}, "must be one of random, clustering, inner, inter"),
  ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, changes, options, words):
  # Catches units that are left over, and an importance of another model.
  dense = models.Model(models.config(tmp_path)).weights
  sparse = models.Model(models.config(tmp_path, **SPARSE | changes)).weights
  with pytest.raises(ConfigError, match=words):
    partition(dense, sparse, **options)
