import json

import jax
import numpy as np
import pytest
import tiny

from moe_jax import assembly, load_run
from moe_jax.errors import ConfigError
from moe_jax.run import finish, loop
from moe_jax.surgery import upcycle
from moe_jax.surgery import workdir as module
from moe_jax.training import workdir

pytestmark = pytest.mark.smoke


def train(config, place, steps, monkeypatch):
  """Trains a config without its finish."""
  config.train.steps = steps
  assembly.validate(config, 1)
  workdir.check(place, config)
  with monkeypatch.context() as changed:
    changed.setattr(finish, "finish", lambda *args, **kwargs: {})
    assert loop.train(config, place, {"config": "tiny", "command": ""})


def test_training_goes_on_from_an_upcycled_run(tmp_path, monkeypatch):
  # Catches a workdir that cannot be trained, weights that are drawn anew when training begins, and
  # frozen experts that move.
  dense = tiny.config(tmp_path, model__moe__num_experts=0)
  train(dense, tmp_path / "dense", 2, monkeypatch)
  sparse = tiny.config(
    tmp_path, optimizer__freeze_experts=3, model__moe__router__top_k__gate_norm="top_k"
  )
  module.make(
    tmp_path / "dense", tmp_path / "moe", sparse, lambda run, old, new, config: upcycle(old, new)
  )
  made = load_run(tmp_path / "moe").variables["params"]
  parent = load_run(tmp_path / "dense").variables["params"]
  (layer,) = (name for name in parent if name.startswith("layer_"))
  for e in range(4):
    assert np.array_equal(made[layer]["ffn"]["up"][e], parent[layer]["ffn"]["up"])
  assert json.loads((tmp_path / "moe" / "meta.json").read_text())["imported"]["source"]
  train(sparse, tmp_path / "moe", 2, monkeypatch)
  after = load_run(tmp_path / "moe").variables["params"]
  same = after[layer]["ffn"]["up"] == made[layer]["ffn"]["up"]
  assert same[:3].all() and not same[3].all()
  assert not np.array_equal(after["embedding"], made["embedding"])
  assert not jax.tree.leaves(jax.tree.map(lambda leaf: not np.isfinite(leaf).all() or None, after))


def test_nothing_is_left_of_a_surgery_that_fails(tmp_path, monkeypatch):
  # Catches a half-made workdir, and a folder of the user that is overwritten.
  dense = tiny.config(tmp_path, model__moe__num_experts=0)
  train(dense, tmp_path / "dense", 2, monkeypatch)
  before = sorted(tmp_path.iterdir())

  def fail(run, old, new, config):
    raise ConfigError("model.moe.d_ff", 3, "does not fit")

  with pytest.raises(ConfigError, match="does not fit"):
    module.make(tmp_path / "dense", tmp_path / "moe", tiny.config(tmp_path), fail)
  assert sorted(tmp_path.iterdir()) == before
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "notes.txt").write_text("x")
  with pytest.raises(ConfigError, match="exists"):
    module.make(
      tmp_path / "dense",
      tmp_path / "mine",
      tiny.config(tmp_path),
      lambda run, old, new, config: upcycle(old, new),
    )
  assert (tmp_path / "mine" / "notes.txt").read_text() == "x"
