"""A workdir belongs to one run: other configs and other data are refused, and nothing in it changes."""

import json
import os

import pytest
import tiny

from moe_jax.errors import ConfigError
from moe_jax.training import workdir

pytestmark = pytest.mark.unit


@pytest.fixture
def config(tmp_path):
  return tiny.config(tmp_path / "data")


def test_first_difference_skips_what_moves_no_number(config):
  # Catches: a run that cannot be lengthened or moved to another mesh; one that resumes with another learning rate.
  stored, other = workdir.plain(config), workdir.plain(config)
  other["mesh"]["data"], other["train"]["steps"], other["data"]["threads"] = 4, 999, 7
  assert workdir.first_difference(stored, other) is None
  other["optimizer"]["learning_rate"], other["train"]["batch_size"] = 0.5, 8
  assert workdir.first_difference(stored, other) == ("optimizer.learning_rate", 0.001, 0.5)


def test_another_runs_directory_is_refused_and_untouched(tmp_path, config):
  # Catches: config.json overwritten before it is compared.
  workdir.claim(tmp_path, config)
  workdir.note_start(tmp_path, config, {"data": {"a": "1" * 64}}, {"command": "x"})
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  other = tiny.config(tmp_path / "data", model__d_model=32)
  with pytest.raises(ConfigError, match="model.d_model=32: the run in .* has model.d_model=16"):
    workdir.check(tmp_path, other)
  with pytest.raises(ConfigError, match="began with 1111111111111111"):
    workdir.check_data(tmp_path, {"a": "2" * 64})
  assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  workdir.check(tmp_path, config)
  workdir.check_data(tmp_path, {"a": "1" * 64})


def test_a_second_start_is_added(tmp_path, config):
  # Catches: a resume that forgets how the run began.
  for command in ("first", "second"):
    workdir.claim(tmp_path, config)
    workdir.note_start(tmp_path, config, {"data": {"a": "1"}}, {"command": command})
  meta = json.loads((tmp_path / "meta.json").read_text())
  assert [s["command"] for s in meta["starts"]] == ["first", "second"] and meta["data"] == {"a": "1"}
  assert meta["starts"][0]["packages"]["jax"]


def test_places_that_cannot_be_a_workdir(tmp_path, config):
  # Catches: a late OSError, after the data were prepared.
  (tmp_path / "file").write_text("")
  (tmp_path / "orphan" / "checkpoints" / "10").mkdir(parents=True)
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken" / "config.json").write_text("{")
  for name, words in (("file", "is a file"), ("file/below", "is a file"), ("orphan", "no config.json"),
                      ("broken", "cannot be read")):
    with pytest.raises(ConfigError, match=words):
      workdir.check(tmp_path / name, config)
  workdir.check(tmp_path / "new" / "deep", config)
  assert not (tmp_path / "new").exists()


def test_a_directory_that_cannot_be_written(tmp_path, config, monkeypatch):
  # Catches: no check at all. (Root may write anywhere, so the refusal of the file system is acted.)
  def refuse(*_, **__):
    raise PermissionError
  monkeypatch.setattr(workdir.tempfile, "TemporaryFile", refuse)
  with pytest.raises(ConfigError, match="cannot be written"):
    workdir.check(tmp_path / "new", config)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
  # Catches: a file truncated by a kill between open and write.
  path = tmp_path / "x.json"
  workdir.write_json(path, 1)
  def fail(*_):
    raise OSError
  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError):
    workdir.write_json(path, 2)
  assert json.loads(path.read_text()) == 1


def test_two_processes_cannot_train_in_one_directory(tmp_path):
  # Catches: checkpoints and metrics of two runs interleaved; a directory that stays locked after its process ended.
  with workdir.exclusive(tmp_path):
    with pytest.raises(ConfigError, match="workdir=.*another process is training there"):
      with workdir.exclusive(tmp_path):
        pass
  with workdir.exclusive(tmp_path):
    pass
