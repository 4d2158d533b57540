"""A workdir belongs to one run; other configs and other data are refused without any change."""

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
  # Catches a run that cannot be lengthened or moved to another mesh, and one that resumes with
  # another learning rate.
  stored, other = workdir.plain(config), workdir.plain(config)
  other["mesh"]["data"], other["train"]["steps"], other["data"]["threads"] = 4, 999, 7
  assert workdir.first_difference(stored, other) is None
  other["optimizer"]["learning_rate"], other["train"]["batch_size"] = 0.5, 8
  assert workdir.first_difference(stored, other) == ("optimizer.learning_rate", 0.001, 0.5)


def test_another_runs_directory_is_refused_and_untouched(tmp_path, config):
  # Catches a config.json that is overwritten before it is compared.
  workdir.claim(tmp_path, config)
  workdir.note_start(
    tmp_path, config, {"data": {"a": "1" * 64}, "tokenizer": "bytes"}, {"command": "x"}
  )
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  other = tiny.config(tmp_path / "data", model__d_model=32)
  with pytest.raises(ConfigError, match="model.d_model=32: the run in .* has model.d_model=16"):
    workdir.check(tmp_path, other)
  with pytest.raises(ConfigError, match="began with 1111111111111111"):
    workdir.check_data(tmp_path, {"a": "2" * 64}, "bytes")
  with pytest.raises(
    ConfigError, match="data.tokenizer='other': .* began with bytes; restore the tokenizer's file"
  ):
    workdir.check_data(tmp_path, {"a": "1" * 64}, "other")
  assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  workdir.check(tmp_path, config)
  workdir.check_data(tmp_path, {"a": "1" * 64}, "bytes")


def test_an_end_holds_for_its_config_and_its_files(tmp_path, config):
  # Catches a run that is taken for finished although it goes on, is evaluated in another way, or
  # has lost or damaged results, and a digest that knows one of the files only.
  facts = {"data": {}, "tokenizer": "bytes"}

  def end():
    for name in ("results.json", "routing.json"):
      (tmp_path / name).write_text("{}")
    workdir.note_end(tmp_path)
    return workdir.has_ended(tmp_path, config)

  assert not workdir.has_ended(tmp_path / "new", config)
  workdir.note_start(tmp_path, config, facts, {})
  assert not workdir.has_ended(tmp_path, config) and end()
  for changes in ({"train__steps": 7}, {"train__final_eval_batches": 3}, {"report__compare": "x"}):
    assert not workdir.has_ended(tmp_path, tiny.config(tmp_path / "data", **changes)), changes
  (tmp_path / "results.json").write_text("{} ")
  assert not workdir.has_ended(tmp_path, config) and end()
  (tmp_path / "routing.json").unlink()
  assert not workdir.has_ended(tmp_path, config) and end()
  workdir.note_start(tmp_path, config, facts, {})
  assert not workdir.has_ended(tmp_path, config)


def test_a_second_start_is_added(tmp_path, config):
  # Catches a resume that forgets how the run began.
  for command in ("first", "second"):
    workdir.claim(tmp_path, config)
    workdir.note_start(tmp_path, config, {"data": {"a": "1"}}, {"command": command})
  meta = json.loads((tmp_path / "meta.json").read_text())
  assert [s["command"] for s in meta["starts"]] == ["first", "second"] and meta["data"] == {
    "a": "1"
  }
  assert meta["starts"][0]["packages"]["jax"]


def test_places_that_cannot_be_a_workdir(tmp_path, config):
  # Catches an OSError that only comes after the data were prepared.
  (tmp_path / "file").write_text("")
  (tmp_path / "orphan" / "checkpoints" / "10").mkdir(parents=True)
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken" / "config.json").write_text("{")
  for name, words in (
    ("file", "is a file"),
    ("file/below", "is a file"),
    ("orphan", "no config.json"),
    ("broken", "cannot be read"),
  ):
    with pytest.raises(ConfigError, match=words):
      workdir.check(tmp_path / name, config)
  workdir.check(tmp_path / "new" / "deep", config)
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", workdir.FILES)
def test_what_stands_in_the_place_of_a_runs_file(tmp_path, config, name):
  # Catches a late traceback because of a directory in place of a file, a file in place of a
  # directory, or a broken link.
  place = tmp_path / name
  place.write_text("x") if workdir.FILES[name] else place.mkdir()
  with pytest.raises(ConfigError, match=f"its {name} is a .* and must be a .*; move it away"):
    workdir.check(tmp_path, config)
  place.unlink() if workdir.FILES[name] else place.rmdir()
  place.symlink_to(tmp_path / "nowhere")
  with pytest.raises(ConfigError, match="is a link to nothing"):
    workdir.check(tmp_path, config)


@pytest.mark.parametrize(
  "content",
  [
    "[]",
    "3",
    "null",
    '"x"',
    "{",
    "",
    "\udcff",
    "[" * 100_000,
    "{}",
    '{"data": 1, "starts": []}',
    '{"data": {}, "starts": 3}',
  ],
)
def test_config_and_meta_of_another_content(tmp_path, config, content):
  # Catches an AttributeError, RecursionError or UnicodeDecodeError, and data that are not compared
  # because meta.json is empty.
  (tmp_path / "checkpoints" / "2").mkdir(parents=True)
  (tmp_path / "meta.json").write_bytes(content.encode("utf-8", "surrogateescape"))
  with pytest.raises(
    ConfigError, match="meta.json .*; restore that file, or name another directory"
  ):
    workdir.check_data(tmp_path, {}, "bytes")
  if not content.startswith("{}"):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError):
      workdir.check(tmp_path, config)


def test_checkpoints_without_meta_are_not_trusted(tmp_path):
  # Catches a data check that is skipped once meta.json is deleted.
  workdir.check_data(tmp_path, {"a": "1"}, "bytes")
  (tmp_path / "checkpoints" / "2").mkdir(parents=True)
  with pytest.raises(ConfigError, match="no meta.json, which says what data"):
    workdir.check_data(tmp_path, {"a": "1"}, "bytes")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, monkeypatch):
  # Catches temporary files that accumulate with each kill or stay after a full disk, and a user's
  # file that is removed with them.
  for name in (
    ".config.json.ab12.tmp",
    ".metrics.jsonl.cd34.tmp",
    ".report.html.x.tmp",
    ".mine.tmp",
    "notes.tmp",
  ):
    (tmp_path / name).write_text("x")
  with workdir.exclusive(tmp_path):
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".mine.tmp", "notes.tmp"]
  monkeypatch.setattr(
    os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
  )
  with pytest.raises(OSError):
    workdir.write_json(tmp_path / "x.json", 1)
  assert not list(tmp_path.glob(".x.json*"))


def test_a_directory_that_cannot_be_written(tmp_path, config, monkeypatch):
  # Catches a missing check. Root may write anywhere, so the file system's refusal is simulated.
  def refuse(*_, **__):
    raise PermissionError

  monkeypatch.setattr(workdir.tempfile, "TemporaryFile", refuse)
  with pytest.raises(ConfigError, match="cannot be written"):
    workdir.check(tmp_path / "new", config)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
  # Catches a file that is truncated by a kill between open and write.
  path = tmp_path / "x.json"
  workdir.write_json(path, 1)

  def fail(*_):
    raise OSError

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError):
    workdir.write_json(path, 2)
  assert json.loads(path.read_text()) == 1


def test_two_processes_cannot_train_in_one_directory(tmp_path):
  # Catches two runs whose checkpoints and metrics mix, and a directory that stays locked after its
  # process has ended.
  with workdir.exclusive(tmp_path):
    with pytest.raises(ConfigError, match="workdir=.*another process is training there"):
      with workdir.exclusive(tmp_path):
        pass
  with workdir.exclusive(tmp_path):
    pass
