"""What a workdir's files say, read forgivingly: a missing or broken file is an empty one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Curve(NamedTuple):
  """A metric over time: `values[i]` (a number, or an array by layer) at step `steps[i]`."""

  steps: Float[np.ndarray, "T"]
  values: Float[np.ndarray, "T *shape"]


class Workdir(NamedTuple):
  """The files of a workdir that the report reads."""

  path: Path
  config: Mapping[str, Any]
  meta: Mapping[str, Any]
  results: Mapping[str, Any]
  routing: Mapping[str, Any]
  train: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl, in order of step
  eval: Sequence[Mapping[str, Any]]
  events: Sequence[Mapping[str, Any]]  # in the order in which they happened


def read_workdir(path: str | Path) -> Workdir:
  """Reads whatever is there."""
  path = Path(path)
  files = [_read_json(path / f"{name}.json") for name in ("config", "meta", "results", "routing")]
  lines = _read_lines(path / "metrics.jsonl")
  events = [line for line in lines if line.get("kind") == "event"]
  return Workdir(path, *files, _by_step(lines, "train"), _by_step(lines, "eval"), events)


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> Curve | None:
  """The metric of that name; None if no line has it. Lines whose shape differs from the last one's
  are left out."""
  found = [(line["step"], numbers(line[name])) for line in lines if name in line]
  found = [(step, value) for step, value in found if value is not None]
  if not found:
    return None
  shape = found[-1][1].shape
  found = [(step, value) for step, value in found if value.shape == shape]
  return Curve(
    np.array([step for step, _ in found], float), np.stack([value for _, value in found])
  )


def thin(data: Curve, points: int) -> Curve:
  """At most `points` of them, each the mean of the finite values of as many neighbours; the last
  step is kept."""
  count = len(data.steps)
  if count <= points:
    return data
  edges = np.linspace(0, count, points + 1).astype(int)
  groups = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
  steps = np.array([data.steps[g][-1] for g in groups])
  return Curve(steps, np.stack([_finite_mean(data.values[g]) for g in groups]))


def smooth(values: Float[np.ndarray, "T"], horizon: int) -> Float[np.ndarray, "T"]:
  """Exponential moving average over about `horizon` points, unbiased at the start; what is not
  finite is skipped."""
  keep, total, weight = 1 - 1 / max(1, horizon), 0.0, 0.0
  out = np.full(len(values), np.nan)
  for i, value in enumerate(values):
    if math.isfinite(value):
      total, weight = keep * total + value, keep * weight + 1
    if weight:
      out[i] = total / weight
  return out


def branch(found: Any, *keys: str) -> Mapping[str, Any]:
  """`found[key][key]...` if that is a mapping, else an empty one."""
  for key in keys:
    found = found.get(key) if isinstance(found, Mapping) else None
  return found if isinstance(found, Mapping) else {}


def starts(meta: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
  """What meta.json remembers of each start of the run."""
  found = meta.get("starts")
  return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []


def layer_names(run: Workdir) -> list[str]:
  """A name for each layer with experts: its number in the model where that is known, else its
  rank."""
  load = curve(run.train, "moe/load")
  count = load.values.shape[1] if load is not None and load.values.ndim == 3 else None
  if count is None:
    count = page_layers(run)
  model, moe, known = (
    branch(run.config, "model"),
    branch(run.config, "model", "moe"),
    run.routing.get("layers"),
  )
  if isinstance(known, list) and len(known) == count and not encoder_layers(model):
    return [f"layer {i}" for i in known]
  try:

    def chosen(layers):
      return [i for i in range(moe["first"], layers) if (i - moe["first"]) % moe["every"] == 0]

    names = [f"layer {i}" for i in chosen(model["num_layers"])]
    if encoder := encoder_layers(model):
      names = [f"encoder layer {i}" for i in chosen(encoder)] + [
        f"decoder {name}" for name in names
      ]
  except (KeyError, TypeError, ZeroDivisionError):
    names = []
  return names if len(names) == count else [f"MoE layer {i}" for i in range(count)]


def page_layers(run: Workdir) -> int:
  """How many layers with experts the pages of routing.json show: all, or the encoder's, which come
  first."""
  pages = run.routing.get("pages")
  experts = (
    branch({"page": pages[0]}, "page").get("experts") if isinstance(pages, list) and pages else None
  )
  return len(experts) if isinstance(experts, list) else 0


def encoder_layers(model: Mapping[str, Any]) -> int:
  """Of the config's model; 0 = it has no encoder."""
  encoder = model.get("num_encoder_layers") or model.get("num_layers")
  return encoder if model.get("family") == "encoder_decoder" and isinstance(encoder, int) else 0


def measure(run: Workdir) -> tuple[str, str]:
  """What the run is judged by, and its unit in words."""
  if branch(run.config, "data").get("objective") == "span_corruption":
    return "nats_per_target", "nats a target"
  return "bits_per_byte", "bits per byte"


def number(value: Any) -> float:
  """As a float; NaN if it is none ("NaN", null, text)."""
  try:
    return float(value)
  except (TypeError, ValueError):
    return math.nan


def numbers(value: Any) -> np.ndarray | None:
  """A number or nested lists of numbers as an array, with NaN for what is no number; None if
  ragged."""
  try:
    return np.asarray(value, float)
  except (TypeError, ValueError):
    pass
  try:
    return (
      np.stack([numbers(v) for v in value])
      if isinstance(value, list)
      else np.asarray(number(value))
    )
  except (TypeError, ValueError):
    return None


def _finite_mean(values: np.ndarray) -> np.ndarray:
  finite = np.isfinite(values)
  total = np.where(finite, values, 0).sum(0)
  return np.where(finite.any(0), total / np.maximum(finite.sum(0), 1), np.nan)


def _read_json(path: Path) -> Mapping[str, Any]:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def _read_lines(path: Path) -> list[Mapping[str, Any]]:
  """The lines that are whole JSON objects with a step: a killed run leaves half a line."""
  try:
    text = path.read_text(encoding="utf-8", errors="replace")
  except OSError:
    return []
  lines = []
  for line in text.splitlines():
    try:
      found = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(found, dict) and math.isfinite(number(found.get("step"))):
      lines.append(found)
  return lines


def _by_step(lines: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
  """One line a step, the last written: a resumed run logs the steps since its checkpoint again."""
  latest = {number(line["step"]): line for line in lines if line.get("kind") == kind}
  return [latest[step] for step in sorted(latest)]
