"""Checkpoints: what a run needs to go on as if it had never stopped, saved by Orbax in the
background.

A checkpoint is a directory `checkpoints/<step>` that appears by one rename when it is complete.
Items: `state` (weights, optimizer, router state, key, step), `data` (the iterator's place, JSON)
and `meta` (JSON), which also holds a digest of every array of the state and a seal over all of
this. Both are compared when the checkpoint is restored: a checkpoint that has changed on disk is
never trained on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import sys
import typing
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from orbax import checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from moe_jax import distributed
from moe_jax.errors import ConfigError, Diverged
from moe_jax.training import digest
from moe_jax.training.state import TrainState

ITEMS = ("state", "data", "meta")
BITS = "bits_per_byte"  # the metric by which a checkpoint is best, whatever the run's measure
ASIDE = (
  "set_aside"  # beside `checkpoints`: where checkpoints go that a run cannot or must not go on from
)


class Restored(typing.NamedTuple):
  """What `Checkpoints.restore` read.

  Attributes:
    step: of the checkpoint.
    state: laid out as the abstract state said.
    data: the iterator's place.
    meta: as it was given to `save`.
    told: a sentence for each newer checkpoint, or note of Orbax, that could not be used and was set
      aside.
  """

  step: int
  state: TrainState
  data: dict[str, Any]
  meta: dict[str, Any]
  told: list[str]


class Checkpoints:
  """The checkpoints of one run. A context manager: leaving it waits for the last save.

  Args:
    directory: created if missing. What a killed save left half-written there is removed.
    keep_last: how many of the newest to keep, at least 1.
    keep_best: how many of those with the lowest score to keep besides.
  """

  def __init__(self, directory: pathlib.Path, keep_last: int = 1, keep_best: int = 1):
    self.directory = pathlib.Path(directory).absolute()
    self._told = _without_damaged_notes(self.directory)
    # best_fn with max_to_keep would delete the newest checkpoint whenever two older ones are
    # better.
    keep = AnyPreservationPolicy(
      [
        LatestN(keep_last),
        BestN(
          get_metric_fn=_rank, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
        ),
      ]
    )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=keep,
      best_fn=_rank,
      best_mode="min",
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)

  def __enter__(self) -> Checkpoints:
    _silence_abandoned()
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  def latest_step(self) -> int | None:
    """The step of the newest checkpoint; None: there is no checkpoint."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """The steps of all checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def resumed_step(self, steps: int) -> int | None:
    """The latest step, from which a run of that many goes on; None: there is no checkpoint.

    Raises:
      ConfigError: it is beyond them.
    """
    latest = self.latest_step()
    if latest is not None and latest > steps:
      raise ConfigError(
        "train.steps",
        steps,
        f"the run is already at step {latest}; give at least that many, or another --workdir",
      )
    return latest

  def save(
    self,
    step: int,
    state: TrainState,
    data: dict,
    meta: dict,
    score: float | None = None,
    *,
    require_finite: bool = True,
  ) -> None:
    """Starts to save; returns when `state` may be donated. Does nothing if this step is already
    there.

    Args:
      step: of the state.
      state: what to save.
      data: the iterator's place.
      meta: anything that JSON can hold.
      score: of two checkpoints, the one with the lower score is the better; one that is not finite
        ranks last.
      require_finite: False for a state of several seeds, of which some may have diverged.

    Raises:
      Diverged: the state holds numbers that are not finite. Nothing is written.
    """
    if step in self.steps():
      return
    found = digest.examine(state)
    if found.nonfinite and require_finite:
      raise Diverged(
        f"training has diverged: after step {step} {_listed(found.nonfinite)} no longer finite, so "
        f"that this step was not saved; {self.kept()}"
      )
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=ocp.args.JsonSave(data),
      meta=ocp.args.JsonSave(_sealed(step, data, meta, found.digests)),
    )
    metrics = None if score is None else {BITS: float(score)}
    self._manager.save(step, args=args, metrics=metrics, force=True)

  def kept(self) -> str:
    """What is there to go on from, as a clause of a sentence."""
    self.wait()
    last = self.latest_step()
    return (
      "there is no checkpoint yet"
      if last is None
      else f"checkpoint {self.directory / str(last)} is from before"
    )

  def restore(self, abstract: TrainState, before: int | None = None) -> Restored:
    """The newest checkpoint that is whole.

    A newer one that cannot be read, or whose content is not what was saved, is set aside in the
    directory `set_aside` beside `checkpoints`, once an older one has been restored.

    Args:
      abstract: the shapes, dtypes and shardings of the state.
      before: only checkpoints of lower steps are looked at; None: all are.

    Raises:
      ConfigError: no checkpoint is whole, or they are another model's; all of them are left where
        they are.
    """
    candidates = [
      step for step in sorted(self.steps(), reverse=True) if before is None or step < before
    ]
    faults: dict[int, str] = {}
    for step in candidates:
      fault = ""
      try:
        found = self._read(step, abstract)
      except ConfigError as error:
        fault = error.remedy
      # A checkpoint that one process cannot read is no checkpoint for the others either.
      if distributed.any_process(bool(fault)):
        faults[step] = fault or "cannot be read by another process"
        continue
      state, data, meta = found
      told = [
        f"checkpoint {self.directory / str(bad)} {fault}; it was set aside in "
        f"{self._set_aside(bad)}, and the run goes on from step {step}"
        for bad, fault in faults.items()
      ]
      told, self._told = self._told + told, []
      return Restored(step, state, data, meta, told)
    newest = max(faults)
    raise ConfigError(
      "checkpoint",
      str(self.directory / str(newest)),
      f"{faults[newest]}, and there is no older one "
      "that is whole; nothing was changed; restore this directory from a copy, or start anew with "
      "another --workdir",
    )

  def drop_after(self, step: int) -> None:
    """Sets aside the checkpoints of later steps, because the run goes back to `step`."""
    for later in [s for s in self.steps() if s > step]:
      self._set_aside(later)

  def reached_preemption(self, step: int) -> bool:
    """Whether the cluster wants its machines back; the same on all processes. False without
    `jax.distributed`."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Returns when the save in progress is on disk."""
    self._manager.wait_until_finished()

  def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict, dict]:
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract),
      data=ocp.args.JsonRestore(),
      meta=ocp.args.JsonRestore(),
    )
    with _reading(self.directory / str(step)):
      restored = self._manager.restore(step, args=args)
    state, place = restored["state"], self.directory / str(step)
    meta, digests = _unsealed(place, step, restored["data"], restored["meta"])
    if int(state.step) != step:
      raise _unusable(place, f"is named {step} and holds step {int(state.step)}")
    _compare(place, digests, digest.examine(state).digests)
    return state, restored["data"], meta

  def _set_aside(self, step: int) -> pathlib.Path:
    """Moves a checkpoint into the directory `set_aside`; returns its new place."""
    place = _move_aside(self.directory, self.directory / str(step), str(step))
    self._manager.reload()
    return place


def steps(directory: pathlib.Path) -> list[int]:
  """The complete checkpoints in `directory`, ascending; changes nothing."""
  names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def load_params(directory: pathlib.Path, step: int) -> PyTree:
  """The weights of checkpoint `step` as NumPy arrays, on any machine: no mesh, no model.

  Raises:
    ConfigError: the checkpoint cannot be read, or its weights are not those that were saved.
  """
  place = pathlib.Path(directory).absolute() / str(step)
  with _reading(place), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(place / "state").item_metadata.tree["params"]
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    item = {"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)}
    found = reader.restore(
      place / "state",
      args=ocp.args.PyTreeRestore(item=item, restore_args={"params": args}, partial_restore=True),
    )
    data, meta = (json.loads((place / name / "metadata").read_text()) for name in ("data", "meta"))
  _, digests = _unsealed(place, step, data, meta)
  wanted = {name: value for name, value in digests.items() if name.startswith("params/")}
  _compare(place, wanted, digest.examine(found).digests)
  return found["params"]


def parameters_sha256(params: PyTree) -> str:
  """A fingerprint of the weights: SHA-256 over path, dtype, shape and bytes of each, in the order
  of the paths."""
  leaves = {name: np.asarray(leaf) for name, leaf in digest.paths(params).items()}
  sha = hashlib.sha256()
  for name in sorted(leaves):
    leaf = np.ascontiguousarray(leaves[name])
    sha.update(f"{name} {leaf.dtype.name} {leaf.shape}\n".encode())
    sha.update(leaf.tobytes())
  return sha.hexdigest()


def count(params: PyTree) -> int:
  """Number of weights."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def _without_damaged_notes(directory: pathlib.Path) -> list[str]:
  """Sets aside what Orbax notes beside a checkpoint, where it cannot be read; a sentence for each
  such file.

  The state does not need these notes, which Orbax reads of all checkpoints before it restores any:
  the scores, and when and by what the checkpoint was written.
  """
  told = []
  for step in steps(directory):
    for note in ("metrics/metrics", "_CHECKPOINT_METADATA"):
      path = directory / str(step) / note
      if path.exists() and not _is_note(path):
        place = _move_aside(directory, path, f"{step}-{path.name}")
        told.append(
          f"{path} is damaged and was moved to {place}; the checkpoint's state does not need it"
        )
  return told


def _is_note(path: pathlib.Path) -> bool:
  """Whether a file holds a JSON object, whose score is a number if it has one."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return False
  return isinstance(found, dict) and isinstance(found.get(BITS, 0.0), (int, float))


def _move_aside(directory: pathlib.Path, path: pathlib.Path, name: str) -> pathlib.Path:
  """Moves `path` into `set_aside` beside the checkpoints; returns its new place. All processes must
  call it."""
  home = directory.parent / ASIDE
  place, number = home / f"{directory.name}-{name}", 1
  while place.exists():
    number += 1
    place = home / f"{directory.name}-{name}-{number}"
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("all know where to")
  if jax.process_index() == 0:
    home.mkdir(exist_ok=True)
    os.rename(path, place)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("it is there")
  return place


def _rank(metrics: Any) -> float:
  """A checkpoint's score, or infinity where it has none that can be compared: NaN is neither above
  nor below others."""
  score = metrics.get(BITS) if isinstance(metrics, Mapping) else None
  return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else math.inf


def _sealed(step: int, data: dict, meta: dict, digests: dict[str, str]) -> dict[str, Any]:
  """The item `meta`, with the arrays' digests and a SHA-256 of everything that is not an array."""
  return {"meta": meta, "digests": digests, "seal": _seal(step, data, meta, digests)}


def _unsealed(
  place: pathlib.Path, step: int, data: Any, stored: Any
) -> tuple[dict, dict[str, str]]:
  """`(meta, digests)` of the item `meta` of the checkpoint at `place`.

  Raises:
    ConfigError: there is no seal, or it does not fit.
  """
  parts = [
    stored.get(name) if isinstance(stored, dict) else None for name in ("meta", "digests", "seal")
  ]
  if not all(isinstance(part, (dict, str)) for part in (data, *parts)):
    raise _unusable(
      place,
      "has no seal: it is damaged, or was saved by a version of moe_jax whose checkpoints had no "
      "digests",
    )
  meta, digests, seal = parts
  if seal != _seal(step, data, meta, digests):
    raise _unusable(
      place, "has changed since it was saved: its seal does not fit its items data and meta"
    )
  return meta, digests


def _seal(step: int, *parts: Any) -> str:
  return hashlib.sha256(json.dumps([step, *parts], sort_keys=True).encode()).hexdigest()


def _compare(place: pathlib.Path, wanted: dict[str, str], found: dict[str, str]) -> None:
  """Raises ConfigError if an array is not what was saved."""
  changed = [name for name in wanted if found.get(name) != wanted[name]]
  if changed:
    raise _unusable(
      place,
      f"has changed since it was saved: of {len(wanted)} arrays {len(changed)} differ from their "
      f"digests, the first is {changed[0]}",
    )


def _listed(names: list[str]) -> str:
  """Names as the subject of a sentence, with its verb."""
  more = f" and {len(names) - 1} more arrays are" if len(names) > 1 else " is"
  return f"{names[0]}{more}"


@contextlib.contextmanager
def _reading(place: pathlib.Path):
  """Turns whatever goes wrong in its body into one sentence."""
  _silence_abandoned()
  try:
    yield
  except Exception as error:  # Orbax, TensorStore, JSON and the file system each have their own
    raise _unusable(place, "cannot be read (it is damaged, or of another model)") from error


_ABANDONED = ("Event loop is closed", "while reading array index")


def _silence_abandoned() -> None:
  """Silences the readers and writers that Orbax abandons, for the rest of this process, and nothing
  else.

  When one array cannot be read or written, Orbax gives up on the others, each of which then prints
  a traceback, some much later. The error itself is raised, and told in a sentence.
  """

  def filtered(hook, error_of):
    @functools.wraps(hook)
    def silenced(*arguments):
      if not any(text in str(error_of(*arguments)) for text in _ABANDONED):
        hook(*arguments)

    silenced.silences_abandoned = True
    return silenced

  for name, error_of in (
    ("excepthook", lambda kind, error, trace: error),
    ("unraisablehook", lambda lost: lost.exc_value),
  ):
    hook = getattr(sys, name)
    if not hasattr(hook, "silences_abandoned"):
      setattr(sys, name, filtered(hook, error_of))


def _unusable(place: pathlib.Path, fault: str) -> ConfigError:
  return ConfigError("checkpoint", str(place), fault)
