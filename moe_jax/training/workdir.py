"""A run's directory: claimed by writing its config, refused to any other run.

config.json   the resolved config        meta.json      versions, data fingerprints, every start's
command checkpoints/  see checkpoints.py         metrics.jsonl  see metrics.py, and tb/ for
TensorBoard results.json, routing.json, report.html  written at the end set_aside/    checkpoints
that the run could not or must not go on from
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from moe_jax.errors import ConfigError

# What may change between two starts of one run: it moves no number, or only says how long and how
# often.
FREE = (
  "mesh",
  "sharding",
  "paper",
  "report",
  "train.steps",
  "train.log_every",
  "train.eval_every",
  "train.eval_batches",
  "train.checkpoint_every",
  "train.keep_last",
  "train.keep_best",
  "train.max_minutes",
  "train.final_eval_batches",
  "train.guard",
  "data.threads",
  "data.cache_dir",
  "data.tfds_dir",
  "model.remat",
)
# What a run writes, and whether each of these is a directory.
FILES = {
  "config.json": False,
  "meta.json": False,
  "metrics.jsonl": False,
  ".lock": False,
  "results.json": False,
  "routing.json": False,
  "report.html": False,
  "checkpoints": True,
  "set_aside": True,
  "tb": True,
}
PACKAGES = ("moe_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_MISSING = "(not set)"
TEMPORARY = ".tmp"  # how the names of files end that are not whole yet


def check(directory: pathlib.Path, config) -> None:
  """Refuses a directory that cannot be, or is not, this run's. Writes nothing.

  Raises:
    ConfigError: a file, a directory that cannot be written, that holds something else, or that
      holds another run.
  """
  if directory.exists() and not directory.is_dir():
    raise ConfigError(
      "workdir", str(directory), "is a file; name a directory, which is created if missing"
    )
  home = next(p for p in (directory, *directory.absolute().parents) if p.exists())
  if not home.is_dir():
    raise ConfigError(
      "workdir",
      str(directory),
      f"cannot be created, because {home} is a file; name another directory",
    )
  if not _writable(home):
    raise ConfigError(
      "workdir", str(directory), f"{home} cannot be written; name a directory that you may write"
    )
  _check_kinds(directory)
  stored = read_json(directory / "config.json", dict)
  if stored is None:
    if _has_checkpoints(directory):
      raise ConfigError(
        "workdir",
        str(directory),
        "holds checkpoints but no config.json, so whose they are is "
        "unknown; restore that file, or name another directory",
      )
    return
  difference = first_difference(stored, plain(config))
  if difference:
    key, before, now = difference
    raise ConfigError(
      key,
      now,
      f"the run in {directory} has {key}={before!r}; give the same value, or another --workdir",
    )


def _check_kinds(directory: pathlib.Path) -> None:
  """Refuses a file where the run needs a directory, a directory where it needs a file, and what
  cannot be read."""
  for name, folder in FILES.items():
    path = directory / name
    if path.exists() and path.is_dir() != folder:
      raise ConfigError(
        "workdir",
        str(directory),
        f"its {name} is a {'file' if folder else 'directory'} and must be a "
        f"{'directory' if folder else 'file'}; move it away, or name another directory",
      )
    if path.is_symlink() and not path.exists():
      raise ConfigError(
        "workdir",
        str(directory),
        f"its {name} is a link to nothing; move it away, or name another directory",
      )


def _has_checkpoints(directory: pathlib.Path) -> bool:
  return (directory / "checkpoints").is_dir() and any((directory / "checkpoints").iterdir())


def check_data(directory: pathlib.Path, fingerprints: dict[str, str], tokenizer: str) -> None:
  """Refuses data or a tokenizer other than those that the run began with.

  Args:
    directory: the workdir.
    fingerprints: of the data, by source.
    tokenizer: the tokenizer's fingerprint.

  Raises:
    ConfigError: names the first source that differs, or the tokenizer; or says that meta.json,
      which remembers them, is gone or is not one of a run.
  """
  meta = read_json(directory / "meta.json", dict)
  if meta is None:
    if _has_checkpoints(directory):
      raise ConfigError(
        "workdir",
        str(directory),
        "holds checkpoints but no meta.json, which says what data they were "
        "trained on; restore that file, or name another directory",
      )
    return
  stored = meta.get("data")
  if not (isinstance(stored, dict) and isinstance(meta.get("starts"), list)):
    raise ConfigError(
      "workdir",
      str(directory),
      "its meta.json is not one that a run has written: it needs the fields "
      "data and starts; restore that file, or name another directory",
    )
  for name in sorted(stored.keys() | fingerprints.keys()):
    before, now = str(stored.get(name, "none")), fingerprints.get(name, "none")
    if before != now:
      raise ConfigError(
        "data.sources",
        name,
        f"its data have SHA-256 {now[:16]}, but the run in {directory} "
        f"began with {before[:16]}; restore the data, or give another --workdir",
      )
  before = meta.get("tokenizer", "none")
  if before != tokenizer:
    raise ConfigError(
      "data.tokenizer",
      tokenizer[:16],
      f"this is the tokenizer's fingerprint, but the run in "
      f"{directory} began with {str(before)[:16]}; restore the tokenizer's file, or give another "
      "--workdir",
    )


def claim(directory: pathlib.Path, config) -> None:
  """Makes the directory this run's, before anything else is put there: writes `config.json` unless
  there is one."""
  directory.mkdir(parents=True, exist_ok=True)
  if not (directory / "config.json").exists():
    write_json(directory / "config.json", plain(config))


@contextlib.contextmanager
def exclusive(directory: pathlib.Path) -> Iterator[None]:
  """Holds the directory for this process. The system lets go of it however the process ends.

  Raises:
    ConfigError: another process of this machine trains there.
  """
  with (directory / ".lock").open("a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ConfigError(
        "workdir",
        str(directory),
        "another process is training there; wait until it has ended, or name another directory",
      ) from error
    except OSError:  # a file system without locks
      pass
    remove_temporaries(directory)
    yield


def remove_temporaries(directory: pathlib.Path) -> None:
  """Removes what `write_atomically` of a killed process left in a directory that this process
  holds."""
  for name in FILES:
    for path in directory.glob(f".{name}.*{TEMPORARY}"):
      path.unlink(missing_ok=True)


def note_start(
  directory: pathlib.Path, config, facts: dict[str, Any], start: dict[str, Any]
) -> None:
  """Adds a start to `meta.json`, which keeps the `facts` of the first, and renews `config.json`
  (`FREE` keys vary)."""
  meta = read_json(directory / "meta.json", dict) or facts | {"starts": []}
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  meta["starts"].append({"time": now} | versions() | start)
  write_json(directory / "meta.json", meta)
  write_json(directory / "config.json", plain(config))


def versions() -> dict[str, Any]:
  """Interpreter, packages, git commit (None outside a clone) and machine of this process."""
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  return {
    "python": platform.python_version(),
    "packages": found,
    "commit": _commit(),
    "machine": platform.platform(),
  }


def hardware(mesh: jax.sharding.Mesh) -> str:
  """The mesh's devices in words, as in "8 x TPU v4"."""
  device = mesh.devices.flat[0]
  cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
  return f"{mesh.size} x {device.device_kind}{cores}"


def first_difference(stored: dict, config: dict, prefix: str = "") -> tuple[str, Any, Any] | None:
  """`(key, stored, new)` of the first field, in the config's order, that differs and is not in
  `FREE`."""
  for key in [*config, *(k for k in stored if k not in config)]:
    name = prefix + key
    before, now = stored.get(key, _MISSING), config.get(key, _MISSING)
    if name in FREE or before == now:
      continue
    if not (isinstance(before, dict) and isinstance(now, dict)):
      return name, before, now
    difference = first_difference(before, now, name + ".")
    if difference:
      return difference
  return None


def plain(config) -> dict[str, Any]:
  """A ConfigDict as JSON would return it: tuples are lists."""
  return json.loads(json.dumps(config.to_dict()))


def read_json(path: pathlib.Path, kind: type = object) -> Any:
  """The file's content; None if there is no file.

  Args:
    path: of the file.
    kind: what the content must be, such as dict.

  Raises:
    ConfigError: it is not JSON, or of another kind.
  """
  if not path.exists():
    return None
  remedy = "restore that file, or name another directory"
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, OSError, RecursionError) as error:
    reason = (
      "it is nested too deeply"
      if isinstance(error, RecursionError)
      else " ".join(str(error).split())
    )
    raise ConfigError(
      "workdir", str(path.parent), f"its {path.name} cannot be read ({reason}); {remedy}"
    ) from error
  if not isinstance(found, kind):
    raise ConfigError(
      "workdir",
      str(path.parent),
      f"its {path.name} holds a {type(found).__name__} of JSON where an object is needed; {remedy}",
    )
  return found


def write_json(path: pathlib.Path, value: Any) -> None:
  write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes the whole file or, if killed, none of it."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
  try:
    with os.fdopen(handle, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:  # a full disk must not be filled further
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def _writable(directory: pathlib.Path) -> bool:
  try:  # os.access says yes to root on a read-only file system
    with tempfile.TemporaryFile(dir=directory):
      return True
  except OSError:
    return False


def _commit() -> str | None:
  try:
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed, perhaps below somebody else's clone
      return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None
