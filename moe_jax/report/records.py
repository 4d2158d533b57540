"""Reads the files of a workdir for the report.

Missing or damaged files are treated as empty, so that a report can be built of any run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Curve(NamedTuple):
  """A metric over time.

  Attributes:
    steps: [T] The training steps.
    values: [T, ...] The value at each step: a number, or an array such as one entry per layer.
  """

  steps: Float[np.ndarray, "T"]
  values: Float[np.ndarray, "T *shape"]


class Workdir(NamedTuple):
  """The contents of the files of a workdir that the report reads.

  Attributes:
    path: The folder.
    config: The contents of config.json. Like the next three, it is {} if the file is missing.
    meta: The contents of meta.json.
    results: The contents of results.json.
    routing: The contents of routing.json.
    train: The training lines of metrics.jsonl, one per step in ascending order.
    eval: The evaluation lines of metrics.jsonl, one per step in ascending order.
    events: The events in metrics.jsonl, in the order in which they happened.
    mixture: The lines of metrics.jsonl about changed shares of the sources, as `train`.
  """

  path: Path
  config: Mapping[str, Any]
  meta: Mapping[str, Any]
  results: Mapping[str, Any]
  routing: Mapping[str, Any]
  train: Sequence[Mapping[str, Any]]
  eval: Sequence[Mapping[str, Any]]
  events: Sequence[Mapping[str, Any]]
  mixture: Sequence[Mapping[str, Any]] = ()


def read_workdir(path: str | os.PathLike) -> Workdir:
  """Reads all files of the workdir at `path` that exist.

  A row of a study with several seeds has its curves in results.json. They become the means over its
  seeds, and so do its scores.
  """
  path = Path(path)
  config, meta, results, routing = (
    _read_json(path / f"{name}.json") for name in ("config", "meta", "results", "routing")
  )
  lines = _read_lines(path / "metrics.jsonl")
  if isinstance(results.get("seeds"), int):
    results, more = _of_seeds(results)
    lines += more
  events = [line for line in lines if line.get("kind") == "event"]
  train, evaluations, mixture = (_by_step(lines, kind) for kind in ("train", "eval", "mixture"))
  return Workdir(path, config, meta, results, routing, train, evaluations, events, mixture)


def _of_seeds(results: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
  """Returns the means of the results of several seeds, and their curves as lines of metrics.

  `experiments/common/seeds.py` says what the results hold. Seeds that diverged are left out. The
  load of each expert is that of the first seed.
  """
  diverged = results.get("diverged")
  kept = [step is None for step in diverged] if isinstance(diverged, list) else []

  def mean(values: Any) -> Any:
    """Returns the mean over the first axis, that of the seeds; what has none is returned as is."""
    array = numbers(values) if isinstance(values, list) else None
    if array is None or len(array) != len(kept):
      return values
    return _finite_mean(array[np.array(kept, bool)]).tolist()

  measures = ("bits_per_byte", "nats_per_target", "loss")
  means = {
    name: {source: mean(seeds) for source, seeds in branch(results, name).items()}
    for name in measures
    if name in results
  }
  lines = []
  for kind in ("train", "eval"):
    found = branch(results, kind)
    curves = {name: mean(values) for name, values in found.items() if name != "step"}
    for i, step in enumerate(found.get("step", ())):
      # Losses and norms have the same names in a run of one seed; the others are the routers'.
      named = {
        _name_of(kind, name): values[i] for name, values in curves.items() if i < len(values)
      }
      lines.append({"kind": kind, "step": step} | named)
  load = branch(results, "load")
  layers = numbers(load.get("layers"))  # [Lm, T, E]
  if layers is not None and layers.ndim == 3:
    by_step = {line["step"]: line for line in lines if line["kind"] == "train"}
    for step, shares in zip(load.get("step", ()), layers.swapaxes(0, 1), strict=False):
      if step in by_step:
        by_step[step]["moe/load"] = shares.tolist()
  return {**results, **means}, lines


def _name_of(kind: str, name: str) -> str:
  """Returns the name that a curve of a row of several seeds has in metrics.jsonl."""
  if kind == "eval":
    return f"{name}/mean of the sources"
  return name if name in ("loss", "cross_entropy", "grad_norm") else f"moe/{name}"


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> Curve | None:
  """Returns the metric called `name`, or None if no line has it.

  Lines whose value has another shape than the last one are left out.
  """
  points = [(line["step"], numbers(line[name])) for line in lines if name in line]
  points = [(step, value) for step, value in points if value is not None]
  if not points:
    return None
  shape = points[-1][1].shape
  points = [(step, value) for step, value in points if value.shape == shape]
  return Curve(
    np.array([step for step, _ in points], float), np.stack([value for _, value in points])
  )


def thin(data: Curve, points: int) -> Curve:
  """Reduces a curve to at most `points` points by averaging groups of neighbours.

  Only finite values enter the mean. A group is placed at its last step, so the last step is kept.
  """
  count = len(data.steps)
  if count <= points:
    return data
  edges = np.linspace(0, count, points + 1).astype(int)
  groups = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
  steps = np.array([data.steps[g][-1] for g in groups])
  return Curve(steps, np.stack([_finite_mean(data.values[g]) for g in groups]))


def smooth(values: Float[np.ndarray, "T"], horizon: int) -> Float[np.ndarray, "T"]:
  """Returns the exponential moving average over about `horizon` points.

  The average is unbiased at the start, and values that are not finite are skipped.
  """
  keep, total, weight = 1 - 1 / max(1, horizon), 0.0, 0.0
  out = np.full(len(values), np.nan)
  for i, value in enumerate(values):
    if math.isfinite(value):
      total, weight = keep * total + value, keep * weight + 1
    if weight:
      out[i] = total / weight
  return out


def branch(found: Any, *keys: str) -> Mapping[str, Any]:
  """Returns the mapping at `found[key][key]...`, or {} if there is no mapping there."""
  for key in keys:
    found = found.get(key) if isinstance(found, Mapping) else None
  return found if isinstance(found, Mapping) else {}


def starts(meta: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
  """Returns the entries of meta.json about each start of the run, oldest first."""
  entries = meta.get("starts")
  return (
    [start for start in entries if isinstance(start, dict)] if isinstance(entries, list) else []
  )


def layer_names(run: Workdir) -> list[str]:
  """Returns a name for each layer with experts.

  A name contains the index of the layer in the model if it is known, and otherwise the index among
  the layers with experts.
  """
  load = curve(run.train, "moe/load")
  count = load.values.shape[1] if load is not None and load.values.ndim == 3 else None
  if count is None:
    count = page_layers(run)
  model, moe, indices = (
    branch(run.config, "model"),
    branch(run.config, "model", "moe"),
    run.routing.get("layers"),
  )
  if isinstance(indices, list) and len(indices) == count and not encoder_layers(model):
    return [f"layer {i}" for i in indices]
  try:

    def moe_layers(layers):
      # Older runs have no such key.
      dense = moe.get("dense_layers", ())
      found = [i for i in range(moe["first"], layers) if (i - moe["first"]) % moe["every"] == 0]
      return [i for i in found if i not in dense]

    names = [f"layer {i}" for i in moe_layers(model["num_layers"])]
    if encoder := encoder_layers(model):
      names = [f"encoder layer {i}" for i in moe_layers(encoder)] + [
        f"decoder {name}" for name in names
      ]
  except (KeyError, TypeError, ZeroDivisionError):
    names = []
  return names if len(names) == count else [f"MoE layer {i}" for i in range(count)]


def page_layers(run: Workdir) -> int:
  """Returns the number of layers with experts that the pages of routing.json show.

  These are all layers with experts, or those of the encoder in an encoder-decoder. The encoder's
  layers come first in `layer_names`.
  """
  pages = run.routing.get("pages")
  experts = (
    branch({"page": pages[0]}, "page").get("experts") if isinstance(pages, list) and pages else None
  )
  return len(experts) if isinstance(experts, list) else 0


def encoder_layers(model: Mapping[str, Any]) -> int:
  """Returns the number of encoder layers of `config.model`, or 0 if it has no encoder."""
  encoder = model.get("num_encoder_layers") or model.get("num_layers")
  return encoder if model.get("family") == "encoder_decoder" and isinstance(encoder, int) else 0


def measure(run: Workdir) -> tuple[str, str]:
  """Returns the name of the metric that the run is judged by, and its unit in words."""
  if branch(run.config, "data").get("objective") == "span_corruption":
    return "nats_per_target", "nats per target"
  return "bits_per_byte", "bits per byte"


def number(value: Any) -> float:
  """Returns `value` as a float, or NaN if it is not a number (null, text, "NaN")."""
  try:
    return float(value)
  except (TypeError, ValueError, OverflowError):  # an int may be too large for a float
    return math.nan


def numbers(value: Any) -> np.ndarray | None:
  """Converts a number or nested lists of numbers to an array, or to None if the lists are ragged.

  Entries that are not numbers become NaN.
  """
  try:
    return np.asarray(value, float)
  except (TypeError, ValueError, OverflowError):
    pass
  if not isinstance(value, list):
    return np.asarray(number(value))
  parts = [part for part in map(numbers, value) if part is not None]
  if len(parts) < len(value):
    return None
  try:
    return np.stack(parts)
  except ValueError:
    return None


def _finite_mean(values: np.ndarray) -> np.ndarray:
  """Returns the mean of the finite values over the first axis, or NaN where there is none."""
  finite = np.isfinite(values)
  total = np.where(finite, values, 0).sum(0)
  return np.where(finite.any(0), total / np.maximum(finite.sum(0), 1), np.nan)


def _read_json(path: Path) -> Mapping[str, Any]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return content if isinstance(content, dict) else {}


def _read_lines(path: Path) -> list[Mapping[str, Any]]:
  """Returns the lines that are complete JSON objects with a step.

  A run that was killed can leave half a line behind.
  """
  try:
    text = path.read_text(encoding="utf-8", errors="replace")
  except OSError:
    return []
  lines = []
  for line in text.splitlines():
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(record, dict) and math.isfinite(number(record.get("step"))):
      lines.append(record)
  return lines


def _by_step(lines: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
  """Returns the lines of this kind, sorted by step, with one line per step.

  Of several lines for a step the last one counts, because a resumed run logs the steps since its
  checkpoint again.
  """
  latest = {number(line["step"]): line for line in lines if line.get("kind") == kind}
  return [latest[step] for step in sorted(latest)]
