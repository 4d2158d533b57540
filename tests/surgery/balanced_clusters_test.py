import numpy as np
import pytest

from moe_jax.surgery import balanced_clusters as module
from moe_jax.surgery.balanced_clusters import balanced_clusters

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("exact", [True, False])
def test_clusters_are_equal_in_size_and_near(monkeypatch, exact):
  # Catches clusters of other sizes, and points that are assigned without looking at distances.
  if not exact:
    monkeypatch.setattr(module, "_EXACT", 0)
  rng = np.random.default_rng(0)
  kind = rng.permutation(np.repeat(np.arange(4), 10))
  points = 10 * np.eye(4)[kind] + rng.normal(size=(40, 4))
  label = balanced_clusters(points, 4, np.random.default_rng(1))
  assert np.bincount(label).tolist() == [10] * 4
  # Each cluster holds one kind.
  assert len({(a, b) for a, b in zip(kind, label, strict=True)}) == 4


@pytest.mark.parametrize("exact", [True, False])
def test_uneven_and_equal_points(monkeypatch, exact):
  # Catches a cluster that grows beyond its size, and a division by a distance of 0.
  if not exact:
    monkeypatch.setattr(module, "_EXACT", 0)
  points = np.concatenate([np.zeros((9, 2)), np.ones((3, 2))])
  label = balanced_clusters(points, 3, np.random.default_rng(0))
  assert np.bincount(label).tolist() == [4, 4, 4]
  # The three points at 1 are in one cluster, which takes one of the others, too.
  assert len(set(label[9:].tolist())) == 1
