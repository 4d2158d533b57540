"""The directory of a run, which a run claims by writing its config; other runs are refused.

config.json    the resolved config
meta.json      versions, fingerprints of the data, commands of all starts, digests of the results
checkpoints/   see checkpoints.py
set_aside/     checkpoints from which the run could not or must not continue
metrics.jsonl  see metrics.py
tb/            events for TensorBoard
profile/       what devices did in some steps, by --profile
wandb_run      the run's id at Weights & Biases, by --tracker=wandb
results.json, routing.json, report.html   written at the end
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import jax

from moe_jax.errors import ConfigError

# The keys that may change between two starts of one run. They do not change the result of a step,
# or they only say how long the run is and how often something is done.
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
# The names that a run writes, and for each whether it is a directory.
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
  "profile": True,
  "wandb_run": False,
}
PACKAGES = ("moe_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_MISSING = "(not set)"
# The suffix of files that are still being written.
TEMPORARY = ".tmp"


def check(directory: pathlib.Path, config) -> None:
  """Raises ConfigError unless the run of this config can use the directory; writes nothing.

  Raises:
    ConfigError: If the path is a file, or if the directory cannot be written, holds something else
      under one of the names that a run writes, or holds another run.
  """
  if directory.exists() and not directory.is_dir():
    raise ConfigError(
      "workdir", str(directory), "is a file; name a directory, which is created if missing"
    )
  existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
  if not existing.is_dir():
    raise ConfigError(
      "workdir",
      str(directory),
      f"cannot be created, because {existing} is a file; name another directory",
    )
  if not _writable(existing):
    raise ConfigError(
      "workdir",
      str(directory),
      f"{existing} cannot be written; name a directory that you may write",
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
  now = plain(config)
  if _is_untrained(directory):
    # Weights that were imported fix the model; how they are trained is still open.
    stored, now = ({"model": each["model"]} for each in (stored, now))
  difference = first_difference(stored, now)
  if difference:
    key, before, now = difference
    raise ConfigError(
      key,
      now,
      f"the run in {directory} has {key}={before!r}; give the same value, or another --workdir",
    )


def _check_kinds(directory: pathlib.Path) -> None:
  """Raises ConfigError if a name that a run writes is of the wrong kind, or a broken link."""
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


def _is_untrained(directory: pathlib.Path) -> bool:
  """Returns whether the workdir holds imported weights, with which no run has begun yet."""
  meta = read_json(directory / "meta.json", dict) or {}
  return "imported" in meta and meta.get("starts") == []


def _has_checkpoints(directory: pathlib.Path) -> bool:
  """Returns whether the workdir holds anything in `checkpoints`."""
  return (directory / "checkpoints").is_dir() and any((directory / "checkpoints").iterdir())


def check_data(directory: pathlib.Path, fingerprints: dict[str, str], tokenizer: str) -> None:
  """Raises ConfigError if the data or the tokenizer are not those that the run began with.

  Args:
    directory: The workdir.
    fingerprints: The fingerprints of the data by source.
    tokenizer: The tokenizer's fingerprint.

  Raises:
    ConfigError: If the data of a source or the tokenizer differ, or if meta.json, which holds their
      fingerprints, is missing beside checkpoints or is not the meta.json of a run.
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
  if _is_untrained(directory):
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
  """Claims the directory for this run by writing `config.json`, unless there is one.

  This must come before anything else is written there.
  """
  directory.mkdir(parents=True, exist_ok=True)
  if not (directory / "config.json").exists():
    write_json(directory / "config.json", plain(config))


@contextlib.contextmanager
def exclusive(directory: pathlib.Path) -> Iterator[None]:
  """Holds a lock on the directory, which the system releases however the process ends.

  Raises:
    ConfigError: If another process of this machine trains there.
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
    except OSError:
      # This file system has no locks.
      pass
    remove_temporaries(directory)
    yield


def remove_temporaries(directory: pathlib.Path) -> None:
  """Removes temporary files that `write_atomically` left behind in a process that was killed.

  The caller must hold the directory, so that no other process is just writing such a file.
  """
  for name in FILES:
    for path in directory.glob(f".{name}.*{TEMPORARY}"):
      path.unlink(missing_ok=True)


def note_start(
  directory: pathlib.Path, config, facts: dict[str, Any], start: dict[str, Any]
) -> None:
  """Adds a start of the run to `meta.json`, and writes `config.json` anew.

  Args:
    directory: The workdir.
    config: The config of this start, of which the keys of `FREE` may have changed.
    facts: What `meta.json` holds of the whole run. Only those of the first start are written.
    start: What `meta.json` holds of this start. The time and the versions are added.
  """
  meta = read_json(directory / "meta.json", dict) or {"starts": []}
  if not meta["starts"]:
    meta |= facts
  # What an earlier start has written at its end is not the end of this one.
  meta.pop("end", None)
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  meta["starts"].append({"time": now} | versions() | start)
  write_json(directory / "meta.json", meta)
  write_json(directory / "config.json", plain(config))


def note_end(directory: pathlib.Path) -> None:
  """Notes in `meta.json` that the present start has written all results; see `has_ended`."""
  meta = read_json(directory / "meta.json", dict)
  # Without it, the next start asks for the file.
  if meta is not None:
    write_json(directory / "meta.json", meta | {"end": _digests(directory)})


def has_ended(directory: pathlib.Path, config) -> bool:
  """Returns whether the directory has all results of this very config, as they were written.

  The report is not looked at, because it can be made from the other files at any time.

  Args:
    directory: The workdir, which `check` has accepted.
    config: The config of this start. A key of `FREE` that has changed means a new end, too, because
      it may change how the run is evaluated or what it is compared with.
  """
  meta = read_json(directory / "meta.json", dict) or {}
  # `config.json` is the config of the last start, whose end is noted.
  return (
    "end" in meta
    and meta["end"] == _digests(directory)
    and read_json(directory / "config.json", dict) == plain(config)
  )


def _digests(directory: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of each file of results from which the report is made."""
  paths = (directory / name for name in ("results.json", "routing.json"))
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()
  }


def versions() -> dict[str, Any]:
  """Returns the interpreter, packages, git commit (None outside a clone) and machine."""
  packages = {}
  for name in PACKAGES:
    try:
      packages[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      packages[name] = "not installed"
  return {
    "python": platform.python_version(),
    "packages": packages,
    "commit": _commit(),
    "machine": platform.platform(),
  }


def hardware(mesh: jax.sharding.Mesh) -> str:
  """Returns the mesh's devices in words, as in "8 x TPU v4"."""
  device = mesh.devices.flat[0]
  cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
  return f"{mesh.size} x {device.device_kind}{cores}"


def first_difference(stored: dict, config: dict, prefix: str = "") -> tuple[str, Any, Any] | None:
  """Returns the first difference between two configs in keys that must not change.

  Args:
    stored: The config of the first start, as JSON holds it.
    config: The config of this start, as JSON would hold it.
    prefix: The dotted name of the sections that are compared, with a dot at its end.

  Returns:
    `(key, stored value, new value)` of the first key, in the config's order, that differs and is
    not in `FREE`; None if there is no such key.
  """
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
  """Returns a ConfigDict as JSON would return it, with lists for tuples."""
  return json.loads(json.dumps(config.to_dict()))


def read_json(path: pathlib.Path, kind: type = object) -> Any:
  """Returns the content of a JSON file, or None if there is no file.

  Args:
    path: The path of the file.
    kind: The type that the content must have, such as dict.

  Raises:
    ConfigError: If the file is not JSON, or if its content has another type.
  """
  if not path.exists():
    return None
  remedy = "restore that file, or name another directory"
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, OSError, RecursionError) as error:
    reason = (
      "it is nested too deeply"
      if isinstance(error, RecursionError)
      else " ".join(str(error).split())
    )
    raise ConfigError(
      "workdir", str(path.parent), f"its {path.name} cannot be read ({reason}); {remedy}"
    ) from error
  if not isinstance(content, kind):
    raise ConfigError(
      "workdir",
      str(path.parent),
      f"its {path.name} holds a {type(content).__name__} of JSON where an object is needed; "
      f"{remedy}",
    )
  return content


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a value as indented JSON; see `write_atomically`."""
  write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file so that it is either complete or, if the process is killed, unchanged."""
  with atomic_file(path) as file:
    file.write(text.encode())


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Yields an open file that takes the place of `path` at the end of the body.

  If the body fails, or the process is killed, `path` is unchanged.
  """
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
  try:
    with os.fdopen(handle, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    # If the disk is full, the remains must not fill it further.
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def _writable(directory: pathlib.Path) -> bool:
  """Returns whether files can be created in the directory."""
  # `os.access` would return True for root even on a read-only file system.
  try:
    with tempfile.TemporaryFile(dir=directory):
      return True
  except OSError:
    return False


def _commit() -> str | None:
  """Returns the git commit of the clone that this file is in, or None if it is in no clone."""
  try:
    root = pathlib.Path(__file__).resolve().parents[2]
    # An installed package may lie below somebody else's clone, whose commit would be wrong.
    if not (root / ".git").exists():
      return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None
