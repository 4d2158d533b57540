"""Tests the command `python -m moe_jax convert SOURCE DESTINATION`."""

import pytest
from interop import checkpoints
from safetensors.numpy import load_file

from moe_jax import convert

pytestmark = pytest.mark.unit


def test_it_converts_both_ways(tmp_path, capsys):
  # Catches a direction that is taken from anything but the source.
  values = checkpoints.tensors("llama")
  source = checkpoints.write(tmp_path / "llama", values, checkpoints.config("llama"))
  assert convert.main(["convert", str(source), str(tmp_path / "run")]) == 0
  assert f"--config={tmp_path}/run/config.py" in capsys.readouterr().out
  assert convert.main(["convert", str(tmp_path / "run"), str(tmp_path / "back"), "--step=0"]) == 0
  assert load_file(tmp_path / "back" / "model.safetensors").keys() == values.keys()


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["nothing", "out"], "there is no such folder"),
    (["nothing"], "DESTINATION=None: is missing"),
    (["nothing", "out", "--step=-1"], "step='-1'"),
    (["nothing", "out", "--step=3"], "is for a workdir"),
  ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, arguments, words, monkeypatch):
  # Catches a traceback, and a step that is silently not used.
  monkeypatch.chdir(tmp_path)
  assert convert.main(["convert", *arguments]) == 2
  assert words in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
