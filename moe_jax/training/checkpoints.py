"""Checkpoints: what a run needs to go on as if it had never stopped, saved by Orbax in the background.

A checkpoint is a directory `checkpoints/<step>` that appears by one rename when it is complete. Items: `state`
(weights, optimizer, router state, key, step), `data` (the iterator's place, JSON) and `meta` (JSON).
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from orbax import checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from moe_jax.errors import ConfigError
from moe_jax.training.state import TrainState

ITEMS = ("state", "data", "meta")
BITS = "bits_per_byte"  # the metric by which a checkpoint is best, whatever the run's measure


class Checkpoints:
  """The checkpoints of one run; keeps the latest and the best. A context manager: leaving it waits for the last save.

  Args:
    directory: created if missing. What a killed save left half-written there is removed.
  """

  def __init__(self, directory: pathlib.Path):
    self.directory = pathlib.Path(directory).absolute()
    bits = lambda metrics: metrics[BITS]
    # best_fn with max_to_keep would delete the newest checkpoint whenever two older ones are better.
    keep = AnyPreservationPolicy([LatestN(1), BestN(get_metric_fn=bits, reverse=True, n=1,
                                                    keep_checkpoints_without_metrics=False)])
    options = ocp.CheckpointManagerOptions(preservation_policy=keep, best_fn=bits, best_mode="min",
                                           cleanup_tmp_directories=True, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def resumed_step(self, steps: int) -> int | None:
    """The latest step, from which a run of that many goes on; None: there is no checkpoint.

    Raises:
      ConfigError: it is beyond them.
    """
    latest = self.latest_step()
    if latest is not None and latest > steps:
      raise ConfigError("train.steps", steps, f"the run is already at step {latest}; give at least that many, or "
                        "another --workdir")
    return latest

  def save(self, step: int, state: TrainState, data: dict, meta: dict, score: float | None = None) -> None:
    """Starts to save; returns when `state` may be donated. Does nothing if this step is already there.

    Of two checkpoints, the one with the lower `score` is the better.
    """
    if step in self._manager.all_steps():
      return
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data),
                              meta=ocp.args.JsonSave(meta))
    metrics = None if score is None else {BITS: float(score)}
    self._manager.save(step, args=args, metrics=metrics, force=True)

  def restore(self, abstract: TrainState) -> tuple[TrainState, dict, dict]:
    """`(state, data, meta)` of the latest step, laid out as `abstract` says.

    Raises:
      ConfigError: the checkpoint cannot be read (truncated, missing files, another model's shapes).
    """
    step = self.latest_step()
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore(),
                              meta=ocp.args.JsonRestore())
    with _reading(self.directory, step):
      restored = self._manager.restore(step, args=args)
    if int(restored["state"].step) != step:
      raise _corrupt(self.directory, step)
    return restored["state"], restored["data"], restored["meta"]

  def reached_preemption(self, step: int) -> bool:
    """Whether the cluster wants its machines back; the same on all processes. False without `jax.distributed`."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Returns when the save in progress is on disk."""
    self._manager.wait_until_finished()


def steps(directory: pathlib.Path) -> list[int]:
  """The complete checkpoints in `directory`, ascending; changes nothing."""
  names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def load_params(directory: pathlib.Path, step: int) -> PyTree:
  """The weights of checkpoint `step` as NumPy arrays, on any machine: no mesh, no model.

  Raises:
    ConfigError: the checkpoint cannot be read.
  """
  with _reading(pathlib.Path(directory), step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    path = pathlib.Path(directory).absolute() / str(step) / "state"
    tree = reader.metadata(path).item_metadata.tree["params"]
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    item = {"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)}
    return reader.restore(path, args=ocp.args.PyTreeRestore(
        item=item, restore_args={"params": args}, partial_restore=True))["params"]


def parameters_sha256(params: PyTree) -> str:
  """A fingerprint of the weights: SHA-256 over path, dtype, shape and bytes of each, in the order of the paths."""
  leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  digest = hashlib.sha256()
  for name in sorted(leaves):
    leaf = np.ascontiguousarray(leaves[name])
    digest.update(f"{name} {leaf.dtype.name} {leaf.shape}\n".encode())
    digest.update(leaf.tobytes())
  return digest.hexdigest()


def count(params: PyTree) -> int:
  """Number of weights."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


@contextlib.contextmanager
def _reading(directory: pathlib.Path, step: int):
  """Turns whatever goes wrong in its body into one sentence.

  When one array cannot be read Orbax abandons the readers of the others, which then print a traceback each, some
  later: after a failure those, and only those, stay silenced.
  """
  hooks = sys.excepthook, sys.unraisablehook
  abandoned = lambda error: any(text in str(error) for text in ("Event loop is closed", "while reading array index"))
  sys.excepthook = lambda kind, error, trace: None if abandoned(error) else hooks[0](kind, error, trace)
  sys.unraisablehook = lambda lost: None if abandoned(lost.exc_value) else hooks[1](lost)
  try:
    yield
  except Exception as error:  # Orbax, TensorStore, JSON and the file system each have their own
    raise _corrupt(directory, step) from error
  sys.excepthook, sys.unraisablehook = hooks


def _corrupt(directory: pathlib.Path, step: Any) -> ConfigError:
  older = [s for s in steps(directory) if s < step]
  then = f"to go on from step {older[-1]}" if older else "to start again from step 0"
  return ConfigError("checkpoint", str(directory / str(step)),
                     f"cannot be read (damaged, or not of this model); delete this directory {then}")
