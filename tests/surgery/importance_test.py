import jax
import jax.numpy as jnp
import numpy as np
import pytest
from surgery import models

from moe_jax.errors import ConfigError
from moe_jax.run.load import LoadedRun
from moe_jax.surgery.importance import _BATCH, _rows, importance
from moe_jax.surgery.weights import roll

pytestmark = pytest.mark.numerics


def run(tmp_path, **changes):
  config = models.config(tmp_path, **changes)
  model = models.Model(config)
  return LoadedRun(model.model, roll(model.weights, model.leaves), config), model


def test_importance_is_what_a_loss_loses_without_the_unit(tmp_path):
  # The first-order estimate is compared with the loss of a model without that unit's influence by
  # a small step. Catches units of another layer, sums over texts before the magnitude, and a loss
  # of padding.
  loaded, model = run(tmp_path)
  found = importance(loaded, clusters=2, rows=_BATCH)
  assert found.keys() == {"layer_0/ffn", "layer_1/ffn"}
  assert all(values.shape == (2, 32) for values in found.values())
  (batch,) = jax.tree.map(jnp.asarray, _rows(loaded.config, _BATCH))

  @jax.jit
  def losses(variables):
    logits, _ = model.model.apply(
      variables, batch["inputs"], batch["segment_ids"], batch["positions"], train=False
    )
    wanted = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[
      ..., 0
    ]
    real = batch["segment_ids"] > 0
    return -(wanted * real).sum(axis=1) / real.sum(axis=1)

  def without(unit, step):
    weights = dict(model.weights)
    down = weights["layer_1/ffn/down"].copy()
    down[unit] *= 1 - step
    return losses(roll(weights | {"layer_1/ffn/down": down}, model.leaves))

  for unit in (0, 17):
    difference = np.abs(np.asarray(without(unit, 1e-2) - without(unit, -1e-2))) / 2e-2
    # Both clusters have half of the rows, so that their mean is that of all rows.
    mean = found["layer_1/ffn"][:, unit].mean()
    np.testing.assert_allclose(mean, difference.mean(), rtol=0.03)


def test_clusters_hold_different_texts(tmp_path):
  # Catches clusters that do not depend on the texts.
  loaded, _ = run(tmp_path)
  found = importance(loaded, clusters=2, rows=_BATCH)["layer_0/ffn"]
  assert not np.allclose(found[0], found[1], rtol=1e-3)


def test_models_without_importance_are_refused(tmp_path):
  # Catches a gradient of another vector than the unit's factor, and no rows at all.
  with pytest.raises(ConfigError, match="ffn_bias='additive'"):
    importance(run(tmp_path, model__ffn_bias="additive")[0], 2)
  with pytest.raises(ConfigError, match="must be at least 24, for 3 clusters"):
    importance(run(tmp_path)[0], 3, rows=8)
