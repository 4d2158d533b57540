import sys
import types

import pytest

from moe_jax.errors import ConfigError
from moe_jax.training import boards, metrics

pytestmark = pytest.mark.unit


class Error(Exception):
  pass


def _wandb(monkeypatch, init):
  """Puts a package wandb with this `init` in the place of the real one, installed or not."""
  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=Error))


class Remote:
  def __init__(self):
    self.axes, self.sent, self.open = {}, [], True

  def define_metric(self, name, step_metric=None):
    self.axes[name] = step_metric

  def log(self, points):
    self.sent.append(points)

  def finish(self):
    self.open = False


def test_a_tracker_gets_all_points_and_a_restart_is_the_same_run(tmp_path, monkeypatch):
  # Catches points without their step, a second run after a restart, and a rollback that ends the
  # run at the tracker or sends points that it would refuse.
  remote, asked = Remote(), []

  def init(**options):
    asked.append(options)
    return remote

  _wandb(monkeypatch, init)
  for start in (0, 1):
    writer = metrics.MetricsWriter(tmp_path, start, boards=[boards.Wandb(tmp_path, {"seed": 7})])
    writer.write(start + 1, "train", {"loss": 2.0, "moe/load": [0.25, 0.75]})
    writer.forget_after(start)
    assert remote.open
    writer.write(start + 1, "eval", {"loss": 1.5})
    writer.close()
    assert not remote.open
    remote.open = True
  assert remote.sent[:2] == [
    {"step": 1, "train/loss": 2.0, "train/moe/load/0": 0.25, "train/moe/load/1": 0.75},
    {"step": 1, "eval/loss": 1.5},
  ]
  assert remote.axes == {"step": None, "*": "step"}
  assert asked[0]["id"] == asked[1]["id"] and len(asked[0]["id"]) == 8
  assert asked[0]["config"] == {"seed": 7} and asked[0]["name"] == tmp_path.name


def test_a_tracker_that_is_missing_or_refuses_is_one_sentence(tmp_path, monkeypatch):
  # Catches a traceback of another package, after minutes of reading data.
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ConfigError, match="tracker='wandb': is not installed.*pip install wandb"):
    boards.Wandb(tmp_path, {})

  def refuse(**options):
    raise Error("no API key\n  configured")

  _wandb(monkeypatch, refuse)
  with pytest.raises(ConfigError, match="no API key configured; log in with: wandb login"):
    boards.Wandb(tmp_path, {})
