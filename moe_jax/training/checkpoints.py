"""Checkpoints, from which a run continues as if it had never stopped; Orbax saves them.

A checkpoint is a directory `checkpoints/<step>` that appears by one rename when it is complete. It
is saved in the background. Its items are `state` (weights, optimizer, router state, key, step),
`data` (the data iterator's position, JSON) and `meta` (JSON). `meta` also holds a digest of every
array of the state and a seal, which is a hash of everything else. Both are compared when the
checkpoint is restored, so that a run never trains on a checkpoint that has changed on disk.

Published weights that were imported are a checkpoint of step 0 without an optimizer's state, in the
dtype in which they were published. It is never deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from orbax import checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
  AnyPreservationPolicy,
  BestN,
  CustomSteps,
  LatestN,
  PreservationContext,
)

from moe_jax import distributed
from moe_jax.errors import ConfigError, Diverged
from moe_jax.training import digest
from moe_jax.training.state import TrainState

ITEMS = ("state", "data", "meta")
# The name under which Orbax stores a checkpoint's score, whatever the run's measure is.
BITS = "bits_per_byte"
# The entry of `meta` that says where imported weights come from.
IMPORTED = "imported"
# Bytes of a part of an array that a frugal save compresses at a time.
_CHUNK = 2**24
# The directory beside `checkpoints` for checkpoints from which a run cannot or must not continue.
ASIDE = "set_aside"


class Restored(typing.NamedTuple):
  """The content of a checkpoint, as `Checkpoints.restore` returns it.

  Attributes:
    step: The checkpoint's step.
    state: The state, with the shardings of the abstract state.
    data: The position of the data iterator.
    meta: The value that `save` got.
    told: A sentence for each newer checkpoint, and for each of Orbax's notes, that was unusable and
      was set aside.
  """

  step: int
  state: TrainState
  data: dict[str, Any]
  meta: dict[str, Any]
  told: list[str]


@dataclasses.dataclass
class _Info:
  """What Orbax's policies ask of a checkpoint; no policy of ours asks for the time."""

  step: int
  metrics: dict[str, Any] | None
  time: datetime.datetime = datetime.datetime.min


class Checkpoints:
  """The checkpoints of one run, as a context manager whose exit waits for the last save."""

  def __init__(
    self,
    directory: pathlib.Path,
    keep_last: int = 1,
    keep_best: int = 1,
    at_once: int | None = None,
  ):
    """Opens the directory of the checkpoints.

    Args:
      directory: The directory, which is created if it is missing. Remains of a save that was killed
        are removed from it.
      keep_last: How many of the newest checkpoints to keep, at least 1.
      keep_best: How many of those with the lowest score to keep in addition.
      at_once: The most bytes that a save may copy at a time, at least those of the largest array; a
        save then returns when it is complete. None means that a save copies all arrays and goes on
        in the background.
    """
    self.directory = pathlib.Path(directory).absolute()
    # Makes the state before the first step of imported weights, which come as a state without an
    # optimizer's. The loop sets it.
    self.begin: Callable[[TrainState], TrainState] = lambda weights: weights
    self._told = _without_damaged_notes(self.directory)
    # Orbax's combination of best_fn and max_to_keep would delete the newest checkpoint whenever two
    # older ones have lower scores.
    self._policy = AnyPreservationPolicy(
      [
        LatestN(keep_last),
        # Only imported weights are a checkpoint of step 0, and a run cannot make them again.
        CustomSteps([0]),
        BestN(
          get_metric_fn=_rank, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
        ),
      ]
    )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._policy,
      best_fn=_rank,
      best_mode="min",
      cleanup_tmp_directories=True,
      enable_async_checkpointing=at_once is None,
    )
    self._is_frugal, handlers = at_once is not None, {}
    if at_once is not None:
      handlers["state"] = ocp.PyTreeCheckpointHandler(save_concurrent_gb=at_once // 10**9 + 1)
    self._manager = ocp.CheckpointManager(
      self.directory, options=options, item_names=ITEMS, item_handlers=handlers
    )

  def __enter__(self) -> Checkpoints:
    _silence_abandoned()
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, or None if there is no checkpoint."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Returns the steps of all checkpoints in ascending order."""
    return sorted(self._manager.all_steps())

  def resumed_step(self, steps: int) -> int | None:
    """Returns the latest step, from which a run of `steps` steps continues, or None.

    None means that there is no checkpoint.

    Raises:
      ConfigError: If the latest step is above `steps`.
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
    """Starts to save a checkpoint, and returns as soon as `state` may be donated.

    If this step has a checkpoint already, nothing happens.

    Args:
      step: The step of the state.
      state: The state to save.
      data: The position of the data iterator.
      meta: Anything that JSON can hold.
      score: The score, by which the checkpoint with the lowest one is the best. A score that is not
        finite ranks last. None means that there is none.
      require_finite: Whether all numbers must be finite. False suits a state of several seeds, of
        which some may have diverged.

    Raises:
      Diverged: If the state holds numbers that are not finite. Then nothing is written.
    """
    if step in self.steps():
      return
    examination = digest.examine(state)
    if examination.nonfinite and require_finite:
      raise Diverged(
        f"training has diverged: after step {step} {_listed(examination.nonfinite)} no longer "
        f"finite, so that this step was not saved; {self.kept()}"
      )
    args = ocp.args.Composite(
      state=_in_small_pieces(state) if self._is_frugal else ocp.args.StandardSave(state),
      data=ocp.args.JsonSave(data),
      meta=ocp.args.JsonSave(_sealed(step, data, meta, examination.digests)),
    )
    metrics = None if score is None else {BITS: float(score)}
    self._manager.save(step, args=args, metrics=metrics, force=True)

  def kept(self) -> str:
    """Returns a clause that says which checkpoint a run could continue from."""
    self.wait()
    last = self.latest_step()
    return (
      "there is no checkpoint yet"
      if last is None
      else f"checkpoint {self.directory / str(last)} is from before"
    )

  def save_imported(self, params: PyTree, router_state: PyTree, source: dict[str, Any]) -> None:
    """Saves weights that come from elsewhere as the checkpoint of step 0.

    Args:
      params: The weights.
      router_state: The state of loss-free balancing, or {}.
      source: What JSON shall say of their source.

    Raises:
      Diverged: If the weights hold numbers that are not finite.
    """
    # The key is that of no run: the one that trains makes its own from its seed.
    state = TrainState(jnp.int32(0), params, (), router_state, jax.random.key(0))
    self.save(0, state, {}, {IMPORTED: source, "seconds": 0.0, "guard": {}})

  def restore(self, abstract: TrainState, before: int | None = None) -> Restored:
    """Restores the newest checkpoint that is undamaged.

    Newer checkpoints that cannot be read, or whose content is not what was saved, are moved into
    the directory `set_aside` beside `checkpoints`, but only after an older one has been restored.
    If `before` is None, checkpoints that `keep_last` and `keep_best` do not ask for are deleted,
    because the process that should have deleted them was killed.

    Args:
      abstract: The shapes, dtypes and shardings of the state.
      before: Only checkpoints of steps below this one are tried. None means that all are.

    Raises:
      ConfigError: If no checkpoint is undamaged, or if they belong to another model. All of them
        stay in place.
    """
    candidates = [
      step for step in sorted(self.steps(), reverse=True) if before is None or step < before
    ]
    faults: dict[int, str] = {}
    for step in candidates:
      fault = ""
      try:
        content = self._read(step, abstract)
      except ConfigError as error:
        fault = error.remedy
      # If one process cannot read a checkpoint, the other processes must not use it either.
      if distributed.any_process(bool(fault)):
        faults[step] = fault or "cannot be read by another process"
        continue
      state, data, meta = content
      sentences = [
        f"checkpoint {self.directory / str(bad)} {fault}; it was set aside in "
        f"{self._set_aside(bad)}, and the run goes on from step {step}"
        for bad, fault in faults.items()
      ]
      sentences, self._told = self._told + sentences, []
      if before is None:
        self._delete_superfluous()
      return Restored(step, state, data, meta, sentences)
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
    """Returns whether the cluster is going to preempt this job.

    The answer is the same on all processes. Without `jax.distributed` it is False.
    """
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Waits until the save in progress is on disk."""
    self._manager.wait_until_finished()

  def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict, dict]:
    """Returns `(state, data, meta)` of a checkpoint; raises ConfigError if it is damaged."""
    is_imported = step == 0 and _is_imported(self.directory / "0")
    if is_imported:
      with _reading(self.directory / str(step)):
        abstract = _weights_alone(self.directory / str(step), abstract)
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract),
      data=ocp.args.JsonRestore(),
      meta=ocp.args.JsonRestore(),
    )
    with _reading(self.directory / str(step)):
      restored = self._manager.restore(step, args=args)
    state, checkpoint = restored["state"], self.directory / str(step)
    meta, digests = _unsealed(checkpoint, step, restored["data"], restored["meta"])
    if int(state.step) != step:
      raise _unusable(checkpoint, f"is named {step} and holds step {int(state.step)}")
    _compare(checkpoint, digests, digest.examine(state).digests)
    return self.begin(state) if is_imported else state, restored["data"], meta

  def _delete_superfluous(self) -> None:
    """Deletes the checkpoints that the last save would have deleted if it had not been killed.

    Each save deletes them, so that they would otherwise stay only if no other save follows.
    """
    infos = [_Info(step, self._manager.metrics(step)) for step in self.steps()]
    wanted = self._policy.should_preserve(infos, context=PreservationContext())
    for info, is_wanted in zip(infos, wanted, strict=True):
      if not is_wanted:
        self._manager.delete(info.step)

  def _set_aside(self, step: int) -> pathlib.Path:
    """Moves a checkpoint into the directory `set_aside` and returns its new path."""
    new_path = _move_aside(self.directory, self.directory / str(step), str(step))
    self._manager.reload()
    return new_path


def steps(directory: pathlib.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in `directory`, ascending; changes nothing."""
  names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def load_params(directory: pathlib.Path, step: int) -> PyTree:
  """Returns the weights of checkpoint `step`; see `load_variables`."""
  return load_variables(directory, step)["params"]


def load_variables(directory: pathlib.Path, step: int) -> dict[str, PyTree]:
  """Returns the variables of the model in checkpoint `step` as NumPy arrays.

  This works on any machine, because it needs neither a mesh nor a model.

  Returns:
    The weights as "params" and, if the model has one, the state of loss-free balancing as
    "router_state", as `model.apply` takes them.

  Raises:
    ConfigError: If the checkpoint cannot be read, or its weights are not those that were saved.
  """
  checkpoint = pathlib.Path(directory).absolute() / str(step)
  with _reading(checkpoint), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    saved = reader.metadata(checkpoint / "state").item_metadata.tree
    tree = {name: saved[name] for name in ("params", "router_state") if saved.get(name)}
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    restored = reader.restore(
      checkpoint / "state",
      args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True),
    )
    data, meta = (
      json.loads((checkpoint / name / "metadata").read_text()) for name in ("data", "meta")
    )
  _, digests = _unsealed(checkpoint, step, data, meta)
  read = tuple(f"{name}/" for name in tree)
  wanted = {name: value for name, value in digests.items() if name.startswith(read)}
  _compare(checkpoint, wanted, digest.examine(restored).digests)
  return restored


def parameters_sha256(params: PyTree) -> str:
  """Returns a fingerprint of the weights.

  It is the SHA-256 over the path, dtype, shape and bytes of each weight, in the order of the paths.
  """
  leaves = {name: np.asarray(leaf) for name, leaf in digest.paths(params).items()}
  sha = hashlib.sha256()
  for name in sorted(leaves):
    leaf = np.ascontiguousarray(leaves[name])
    sha.update(f"{name} {leaf.dtype.name} {leaf.shape}\n".encode())
    sha.update(leaf.tobytes())
  return sha.hexdigest()


def count(params: PyTree) -> int:
  """Returns the number of weights."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def _without_damaged_notes(directory: pathlib.Path) -> list[str]:
  """Sets aside Orbax's unreadable notes on checkpoints, and returns a sentence for each of them.

  Orbax reads the notes of all checkpoints before it restores any, so that one damaged note would
  make all checkpoints unusable. The notes are the scores, and when and by what a checkpoint was
  written; the state does not need them.
  """
  sentences = []
  for step in steps(directory):
    for note in ("metrics/metrics", "_CHECKPOINT_METADATA"):
      path = directory / str(step) / note
      if path.exists() and not _is_note(path):
        new_path = _move_aside(directory, path, f"{step}-{path.name}")
        sentences.append(
          f"{path} is damaged and was moved to {new_path}; the checkpoint's state does not need it"
        )
  return sentences


# The types of what Orbax's notes hold. Any other type would end the construction of its manager.
_NOTE_TYPES: Mapping[str, tuple[type, ...]] = {
  BITS: (int, float),
  "item_handlers": (dict, str),
  "metrics": (dict,),
  "performance_metrics": (dict,),
  "custom_metadata": (dict,),
  "init_timestamp_nsecs": (int,),
  "commit_timestamp_nsecs": (int,),
}


def _is_note(path: pathlib.Path) -> bool:
  """Returns whether a file holds a JSON object whose known entries have the right types."""
  try:
    note = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return False
  if not isinstance(note, dict) or note.get(BITS, 0.0) is None:
    return False
  return all(
    note.get(name) is None or isinstance(note[name], types) for name, types in _NOTE_TYPES.items()
  )


def _move_aside(directory: pathlib.Path, path: pathlib.Path, name: str) -> pathlib.Path:
  """Moves `path` into `set_aside` beside the checkpoints, and returns its new path.

  All processes must call this.
  """
  home = directory.parent / ASIDE
  new_path, number = home / f"{directory.name}-{name}", 1
  while new_path.exists():
    number += 1
    new_path = home / f"{directory.name}-{name}-{number}"
  # The processes first agree on a free name; then one of them moves the file, and all wait for it.
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("all know where to")
  if jax.process_index() == 0:
    home.mkdir(exist_ok=True)
    os.rename(path, new_path)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("it is there")
  return new_path


def _rank(metrics: Any) -> float:
  """Returns a checkpoint's score, or infinity if it has no finite one; NaN cannot be ordered."""
  score = metrics.get(BITS) if isinstance(metrics, Mapping) else None
  return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else math.inf


def _sealed(step: int, data: dict, meta: dict, digests: dict[str, str]) -> dict[str, Any]:
  """Returns the item `meta` with the arrays' digests and a SHA-256 of all that is not an array."""
  return {"meta": meta, "digests": digests, "seal": _seal(step, data, meta, digests)}


def _unsealed(
  checkpoint: pathlib.Path, step: int, data: Any, stored: Any
) -> tuple[dict, dict[str, str]]:
  """Returns `(meta, digests)` of a checkpoint's item `meta`; `checkpoint` is its directory.

  Raises:
    ConfigError: If there is no seal, or if it does not match the content.
  """
  parts: list[Any] = [
    stored.get(name) if isinstance(stored, dict) else None for name in ("meta", "digests", "seal")
  ]
  if not all(isinstance(part, (dict, str)) for part in (data, *parts)):
    raise _unusable(
      checkpoint,
      "has no seal: it is damaged, or was saved by a version of moe_jax whose checkpoints had no "
      "digests",
    )
  meta, digests, seal = parts
  if seal != _seal(step, data, meta, digests):
    raise _unusable(
      checkpoint, "has changed since it was saved: its seal does not fit its items data and meta"
    )
  return meta, digests


def _seal(step: int, *parts: Any) -> str:
  """Returns the SHA-256 of the step and of `parts` as JSON."""
  return hashlib.sha256(json.dumps([step, *parts], sort_keys=True).encode()).hexdigest()


def _compare(checkpoint: pathlib.Path, wanted: dict[str, str], actual: dict[str, str]) -> None:
  """Raises ConfigError if the digest of an array is not the one that was saved."""
  changed = [name for name in wanted if actual.get(name) != wanted[name]]
  if changed:
    raise _unusable(
      checkpoint,
      f"has changed since it was saved: of {len(wanted)} arrays {len(changed)} differ from their "
      f"digests, the first is {changed[0]}",
    )


def _in_small_pieces(state: TrainState) -> ocp.args.PyTreeSave:
  """Returns what saves a state with little memory besides it.

  What is compressed but not yet written is kept in memory, chunk by chunk until a file is full.
  """
  pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), state)
  return ocp.args.PyTreeSave(state, save_args=pieces, ocdbt_target_data_file_size=4 * _CHUNK)


def _is_imported(checkpoint: pathlib.Path) -> bool:
  """Returns whether a checkpoint holds weights alone, which were imported."""
  with _reading(checkpoint):
    meta = json.loads((checkpoint / "meta" / "metadata").read_text())["meta"]
    return IMPORTED in meta


def _weights_alone(checkpoint: pathlib.Path, abstract: TrainState) -> TrainState:
  """Returns `abstract` as imported weights are stored: in their own dtypes, without optimizer."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    saved = reader.metadata(checkpoint / "state").item_metadata.tree

  def stored(wanted, found):
    return jax.ShapeDtypeStruct(wanted.shape, found.dtype, sharding=wanted.sharding)

  params = jax.tree.map(stored, abstract.params, saved["params"])
  return abstract.replace(params=params, opt_state=())


def _listed(names: list[str]) -> str:
  """Returns the names as the subject of a sentence, with its verb."""
  if len(names) == 1:
    return f"{names[0]} is"
  others = names[1] if len(names) == 2 else f"{len(names) - 1} more arrays"
  return f"{names[0]} and {others} are"


@contextlib.contextmanager
def _reading(checkpoint: pathlib.Path):
  """Turns every exception of its body into a ConfigError of one sentence."""
  _silence_abandoned()
  try:
    yield
  # Orbax, TensorStore, JSON and the file system have no common class of exceptions.
  except Exception as error:
    raise _unusable(checkpoint, "cannot be read (it is damaged, or of another model)") from error


_ABANDONED = ("Event loop is closed", "while reading array index")


def _silence_abandoned() -> None:
  """Suppresses the tracebacks of reads and writes that Orbax abandons, until this process ends.

  When one array cannot be read or written, Orbax gives up on the others. Each of them then prints a
  traceback, some much later. The error itself is raised and reported in one sentence, so these
  tracebacks only hide it. All other exceptions reach the hooks as before.
  """

  def filtered(hook, error_of):
    @functools.wraps(hook)
    def silenced(*arguments):
      if not any(text in str(error_of(*arguments)) for text in _ABANDONED):
        hook(*arguments)

    typing.cast(Any, silenced).silences_abandoned = True
    return silenced

  for name, error_of in (
    ("excepthook", lambda kind, error, trace: error),
    ("unraisablehook", lambda lost: lost.exc_value),
  ):
    hook = getattr(sys, name)
    if not hasattr(hook, "silences_abandoned"):
      setattr(sys, name, filtered(hook, error_of))


def _unusable(checkpoint: pathlib.Path, fault: str) -> ConfigError:
  """Returns the error that says why a checkpoint cannot be used."""
  return ConfigError("checkpoint", str(checkpoint), fault)
