import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from moe_jax.data import cache
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BUILDER = """
import pathlib, sys, time
from moe_jax.data import cache
def write(file):
  for i in range(20):
    file.write(b"%04d" % i)
    file.flush()
    print(i, flush=True)
    time.sleep(float(sys.argv[2]))
cache.built(pathlib.Path(sys.argv[1]), write)
"""
WHOLE = b"".join(b"%04d" % i for i in range(20))


def _builder(path, pause):
  return subprocess.Popen(
    [sys.executable, "-c", BUILDER, str(path), str(pause)],
    stdout=subprocess.PIPE,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )


def test_a_killed_builder_leaves_no_file(tmp_path):
  # Catches a file that is written under its final name.
  path = tmp_path / "sub" / "x.bin"
  process = _builder(path, 0.5)
  for _ in range(3):
    process.stdout.readline()
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not path.exists() and list(path.parent.glob("*.tmp"))
  assert cache.content(cache.built(path, lambda file: file.write(WHOLE))).tobytes() == WHOLE


def test_builders_at_the_same_time_leave_one_whole_file(tmp_path):
  # Catches two processes that write into the same unfinished file, and one that deletes the file of
  # the other.
  path = tmp_path / "x.bin"
  processes = [_builder(path, 0.02) for _ in range(3)]
  for process in processes:
    process.communicate()
  assert [p.returncode for p in processes] == [0, 0, 0]
  assert cache.content(path).tobytes() == WHOLE and list(tmp_path.iterdir()) == [path]


def test_remains_are_swept_but_not_the_work_of_others(tmp_path):
  # Catches unfinished files that accumulate, and the deletion of a file that another process is
  # writing.
  old, new = tmp_path / "x.bin.aa.tmp", tmp_path / "x.bin.bb.tmp"
  for left in (old, new):
    left.write_bytes(b"?")
  os.utime(old, (time.time() - 7200,) * 2)
  cache.built(tmp_path / "x.bin", lambda file: file.write(b"1"))
  assert not old.exists() and new.exists()


def test_a_failed_build_leaves_nothing_and_a_file_is_built_once(tmp_path):
  # Catches an unfinished file that is kept after an exception, and a file that is written again at
  # every start.
  def fail(file):
    file.write(b"half")
    raise RuntimeError("no")

  with pytest.raises(RuntimeError):
    cache.built(tmp_path / "x", fail)
  assert not list(tmp_path.iterdir())
  cache.built(tmp_path / "x", lambda file: file.write(b"1"))
  assert cache.content(cache.built(tmp_path / "x", fail)).tobytes() == b"1"


def test_folder_that_cannot_be_written(tmp_path):
  # Catches an OSError in place of a message with the field and the remedy.
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="data.cache_dir"):
    cache.built(tmp_path / "file" / "x", lambda file: None)


def test_full_disk(tmp_path):
  # Catches an OSError in place of a message with the field, and an unfinished file that is left on
  # the full disk.
  def fail(file):
    raise OSError(errno.ENOSPC, "No space left on device")

  with pytest.raises(ConfigError, match="data.cache_dir=.* is full"):
    cache.built(tmp_path / "x", fail)
  assert not list(tmp_path.iterdir())


def test_cache_dir(monkeypatch):
  # Catches a configured folder or an XDG_CACHE_HOME that is ignored.
  monkeypatch.setenv("XDG_CACHE_HOME", "/x")
  assert cache.cache_dir("/y").as_posix() == "/y"
  assert cache.cache_dir("").as_posix() == "/x/moe_jax"
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert cache.cache_dir("") == pathlib.Path.home() / ".cache" / "moe_jax"


def test_key_tells_parts_apart():
  # Catches parts that are joined without a separator.
  assert cache.key("a", "bc") != cache.key("ab", "c") and cache.key("a", 1) == cache.key("a", 1)


DAMAGE = {
  "cut": lambda whole: whole[:-1],
  "cut to nothing": lambda whole: b"",
  "cut short": lambda whole: whole[:30],
  "flipped": lambda whole: whole[:7] + bytes([whole[7] ^ 4]) + whole[8:],
  "0xff": lambda whole: b"\xff" * len(whole),
  "no trailer": lambda whole: whole[:80],
  "longer": lambda whole: b"0" + whole,
  "digest": lambda whole: whole[:80] + bytes([whole[80] ^ 1]) + whole[81:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_built_anew_and_told(tmp_path, capfd, damage):
  # Catches a file that is used without a check of its content, even one of a version without
  # digests, and damage that is repaired without a note.
  path, write = tmp_path / "x", lambda file: file.write(WHOLE)
  whole = cache.built(path, write).read_bytes()
  assert not capfd.readouterr().err
  path.write_bytes(damage(whole))
  assert cache.content(cache.built(path, write)).tobytes() == WHOLE and path.read_bytes() == whole
  assert f"note: {path} is damaged" in capfd.readouterr().err
  cache.built(path, lambda file: pytest.fail("was built again"))


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
  # Catches minutes of hashing at each evaluation, and a change during a run that is not noticed.
  path, hashed = cache.built(tmp_path / "x", lambda file: file.write(WHOLE)), []
  cache._whole.clear()
  monkeypatch.setattr(
    cache, "_digest", lambda *args, digest=cache._digest: hashed.append(1) or digest(*args)
  )
  for _ in range(3):
    cache.built(path, lambda file: None)
  assert len(hashed) == 1
  os.utime(path, ns=(1, 1))
  cache.built(path, lambda file: None)
  assert len(hashed) == 2


def test_content_that_the_reader_refuses_is_built_anew(tmp_path):
  # Catches a check of the content that is not called.
  good, write = (lambda content: content.tobytes() != b"bad"), (lambda file: file.write(b"good"))
  path = cache.built(tmp_path / "x", lambda file: file.write(b"bad"))
  cache._whole.clear()
  assert cache.content(cache.built(path, write, good)).tobytes() == b"good"


def test_a_file_that_is_written_to_while_it_is_used(tmp_path):
  # Catches a run that the system kills without a message because a memory-mapped file was
  # truncated, and a run that ends although another process has only replaced or deleted the file.
  path = cache.built(tmp_path / "x", lambda file: file.write(WHOLE))
  unchanged = cache.Unchanged(path)
  cache.replace(path, lambda file: file.write(WHOLE))
  path.unlink()
  unchanged.check()
  path = cache.built(tmp_path / "x", lambda file: file.write(WHOLE))
  unchanged = cache.Unchanged(path)
  os.truncate(path, 3)
  with pytest.raises(
    ConfigError, match="data.cache_dir=.*x': was written to while this run read it"
  ):
    unchanged.check()


@pytest.mark.parametrize("name", ["~nobody_of_this_name/x", "a\0b", "x" * 5000, "/proc/nothing"])
def test_folders_that_cannot_be(name):
  # Catches OSError, RuntimeError and ValueError of the path library.
  with pytest.raises(ConfigError, match="^data.cache_dir=.*--config.data.cache_dir=FOLDER"):
    cache.built(cache.cache_dir(name) / "x", lambda file: None)


def test_a_folder_in_place_of_a_file(tmp_path):
  # Catches an IsADirectoryError.
  (tmp_path / "x").mkdir()
  with pytest.raises(ConfigError, match="data.cache_dir=.*x': cannot be read .*directory"):
    cache.built(tmp_path / "x", lambda file: None)


def test_errors_of_what_is_read_are_not_the_folders(tmp_path):
  # Catches an error about data.cache_dir for a text that was deleted while it was tokenised.
  def write(file):
    open(tmp_path / "gone")

  with pytest.raises(FileNotFoundError):
    cache.built(tmp_path / "x", write)
