"""Where configs are found; what is wrong with them is in train_test.py."""

import pytest

from moe_jax import commands

pytestmark = pytest.mark.unit


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
  # Catches a path that works only in the clone, and a file in the working directory that loses
  # against the clone's.
  monkeypatch.chdir(tmp_path)
  for name in ("configs/quickstart.py", "quickstart.py"):
    assert commands.load_config(name).model.family == "decoder"
  (tmp_path / "mine.py").write_text(
    "from configs import base\ndef get_config(steps):\n  c = base.get_config()\n"
    "  c.train.steps = int(steps)\n  return c\n"
  )
  command = commands.parse(
    ["train", "--config", "mine.py:77", "--workdir", "w", "--config.seed", "3"]
  )
  assert (command.config.train.steps, command.config.seed, command.path) == (77, 3, "mine.py:77")
