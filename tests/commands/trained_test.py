"""Tests how commands load a trained model."""

import pytest
import saved_run

from moe_jax.commands.trained import load, mesh_sizes
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def test_mesh_sizes():
  # Catches an axis that is dropped, and a size that is no number.
  assert mesh_sizes(None) is None
  assert mesh_sizes("data=2,tensor=4") == {"data": 2, "tensor": 4}
  for text in ("data", "data=x", "data=-1", "rows=2", ""):
    with pytest.raises(ConfigError, match="AXIS=N"):
      mesh_sizes(text)


def test_a_run_is_loaded(tmp_path):
  # Catches a step that is not passed on.
  place, _ = saved_run.save(tmp_path)
  assert load({"workdir": str(place), "step": "3"}).config.model.d_model == 16
  with pytest.raises(ConfigError, match="no such checkpoint"):
    load({"workdir": str(place), "step": "4"})
