"""The page that compares runs: overlaid curves, and a table of what differs between them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.report.charts import Line, line_chart
from moe_jax.report.colours import series_colour
from moe_jax.report.records import Curve, Workdir, branch, curve, measure, number, smooth, thin
from moe_jax.report.sections import POINTS, count_words, document, final_scores, time_words

# Keys of a config that differ between any two runs and say nothing about the model.
_NEVER_SHOWN = ("paper.", "report.", "data.cache_dir", "data.threads")


def comparison(runs: Mapping[str, Workdir]) -> str:
  """Returns the page of several runs as an HTML document.

  Args:
    runs: Name -> run, in the order in which they are shown. The first run is the one that the
      others are compared with.
  """
  body = (
    f"<h1>{html.escape(' against '.join(runs))}</h1>"
    '<p class="lead">Differences are to the first run; lower scores are better.</p>'
    + _scores(runs)
    + _differences(runs)
    + _charts(runs)
  )
  return document(f"{', '.join(runs)}: comparison", body)


def names(paths: Sequence[str]) -> list[str]:
  """Returns a short name for each path, which is as much of its end as tells it from the others."""
  parts = [[part for part in path.split("/") if part] or [path] for path in paths]
  for depth in range(1, max(map(len, parts)) + 1):
    short = ["/".join(each[-depth:]) for each in parts]
    if len(set(short)) == len(short):
      return short
  return [f"{'/'.join(each)} ({i})" for i, each in enumerate(parts, 1)]


def _scores(runs: Mapping[str, Workdir]) -> str:
  """Returns the table of the final scores and costs, with differences to the first run."""
  # The unit is a part of the key, because bits per byte and nats per target do not compare.
  scores = [
    {f"{source}, {measure(run)[1]}": score for source, score in final_scores(run)[0].items()}
    for run in runs.values()
  ]
  rows: list[tuple[str, list[float], Callable[[float], str]]] = []
  for words in dict.fromkeys(words for each in scores for words in each):
    values = [each.get(words, math.nan) for each in scores]
    rows.append((words, values, lambda x: f"{x:.3f}"))
  results = [run.results for run in runs.values()]
  for words, find, show in (
    ("parameters", lambda r: branch(r, "parameters").get("total"), count_words),
    ("activated per token", lambda r: branch(r, "parameters").get("activated"), count_words),
    ("FLOPs per token", lambda r: r.get("flops_per_token"), count_words),
    ("training time", lambda r: r.get("wall_seconds"), time_words),
  ):
    rows.append((words, [number(find(result)) for result in results], show))
  lines = ""
  for words, values, show in rows:
    if not any(map(math.isfinite, values)):
      continue
    cells = "".join(
      f"<td>{_cell(value, values[0] if i else math.nan, show)}</td>"
      for i, value in enumerate(values)
    )
    lines += f"<tr><td>{html.escape(words)}</td>{cells}</tr>"
  notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in _notes(runs))
  return f"<h2>Results</h2>{notes}{_table('', runs, lines)}"


def _notes(runs: Mapping[str, Workdir]) -> list[str]:
  """Returns sentences about what makes the scores of the runs hard to compare."""
  notes = []
  for unit, of_run in (
    ("steps", _steps),
    ("tokens", lambda run: number(run.results.get("tokens"))),
  ):
    counts = {name: of_run(run) for name, run in runs.items()}
    known = {count for count in counts.values() if math.isfinite(count)}
    if len(known) > 1:
      each = ", ".join(f"{name} {count:,.0f}" for name, count in counts.items() if count == count)
      notes.append(
        f"The runs were trained for different numbers of {unit} ({each}), so that their scores do "
        "not compare."
      )
      break
  measured = {name: final_scores(run)[1] for name, run in runs.items()}
  if len(set(filter(None, measured.values()))) > 1:
    each = "; ".join(f"{name} {where}" for name, where in measured.items() if where)
    notes.append(f"The runs were measured on different parts of the text: {each}.")
  texts = [branch(run.results, "data") or branch(run.meta, "data") for run in runs.values()]
  for source in dict.fromkeys(source for text in texts for source in text):
    if len({text[source] for text in texts if source in text}) > 1:
      notes.append(f"The runs have different versions of the text {source}.")
  for name, run in runs.items():
    if (seeds := number(run.results.get("seeds"))) > 1:
      notes.append(f"{name} is a row of a study: its numbers are means over {seeds:.0f} seeds.")
  return notes


def _steps(run: Workdir) -> float:
  """Returns the number of steps after which a run was last measured, or NaN."""
  last = run.eval[-1]["step"] if run.eval else math.nan
  return number(run.results.get("steps", last))


def _cell(value: float, base: float, show: Callable[[float], str]) -> str:
  """Returns a value and how far it is from the first run's, as text."""
  if not math.isfinite(value):
    return "-"
  if not math.isfinite(base) or value == base:
    return show(value)
  change = f" ({(value - base) / abs(base):+.1%})" if base else ""
  return show(value) + change


def _differences(runs: Mapping[str, Workdir]) -> str:
  """Returns the table of the keys of the configs whose values differ."""
  flat = [dict(_leaves(run.config)) for run in runs.values()]
  lines = ""
  for key in dict.fromkeys(key for each in flat for key in each):
    values = [each.get(key) for each in flat]
    if key.startswith(_NEVER_SHOWN) or all(value == values[0] for value in values):
      continue
    # The options of a router that a run does not use would be noise.
    shown = [
      value if _is_used(key, each) else None for value, each in zip(values, flat, strict=True)
    ]
    if all(value is None for value in shown):
      continue
    cells = "".join(f"<td>{html.escape('-' if v is None else str(v))}</td>" for v in shown)
    lines += f"<tr><td><code>{html.escape(key)}</code></td>{cells}</tr>"
  if not lines:
    return "<h2>Configs</h2><p>The configs are the same.</p>"
  return f"<h2>Keys that differ</h2>{_table('key', runs, lines)}"


def _is_used(key: str, config: Mapping[str, Any]) -> bool:
  """Returns whether a key is an option of the router or dispatcher that a flat config names."""
  for section in ("model.moe.router", "model.moe.dispatcher"):
    if key.startswith(f"{section}.") and not key.endswith(".name"):
      return key.startswith(f"{section}.{config.get(f'{section}.name')}.")
  return True


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the dotted name and the value of each key."""
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def _table(corner: str, runs: Mapping[str, Workdir], lines: str) -> str:
  """Returns a table with a column for each run."""
  head = "".join(f"<th>{html.escape(name)}</th>" for name in (corner, *runs))
  return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def _charts(runs: Mapping[str, Workdir]) -> str:
  """Returns the curves of all runs: losses, validation scores, routing and speed."""
  loss = {
    name: _smoothed(curve(run.train, "cross_entropy") or curve(run.train, "loss"))
    for name, run in runs.items()
  }
  charts = _chart("Training cross-entropy", loss, "nats per token, smoothed")
  validation = {
    key: measure(run)[1]
    for run in runs.values()
    for line in run.eval[-1:]
    for key in line
    if key.startswith(f"{measure(run)[0]}/")
  }
  for key, unit in validation.items():
    curves = {name: curve(run.eval, key) for name, run in runs.items()}
    charts += _chart(f"Validation: {key.partition('/')[2]}", curves, unit)
  for key, title, note, reduce in (
    ("moe/load", "Largest load of an expert", "as a multiple of an even load", _largest_load),
    ("moe/drop_rate", "Dropped assignments", "share, mean over layers", _mean),
    ("moe/logit_max", "Largest logit of a router", "largest over layers", _largest),
    ("grad_norm", "Gradient norm", "before clipping", _mean),
    ("tokens_per_second", "Tokens per second", "", _mean),
  ):
    curves = {
      name: Curve(data.steps, reduce(data.values)) if (data := curve(run.train, key)) else None
      for name, run in runs.items()
    }
    charts += _chart(title, curves, note, bottom=0.0 if key.startswith("moe/") else None)
  return f'<h2>Curves</h2><div class="figures two">{charts}</div>' if charts else ""


def _chart(
  title: str, curves: Mapping[str, Curve | None], note: str, bottom: float | None = None
) -> str:
  """Returns a chart with a line for each run that has the curve."""
  lines = [
    Line(name, *thin(data, POINTS), series_colour(i))
    for i, (name, data) in enumerate(curves.items())
    if data is not None and data.values.ndim == 1
  ]
  return line_chart(title, lines, note=note, bottom=bottom)


def _smoothed(data: Curve | None) -> Curve | None:
  """Returns a moving average of a curve."""
  if data is None or data.values.ndim != 1:
    return None
  return Curve(data.steps, smooth(data.values, len(data.steps) // 40))


def _largest_load(values: np.ndarray) -> np.ndarray:
  return values.reshape(len(values), -1).max(axis=1) * values.shape[-1]


def _largest(values: np.ndarray) -> np.ndarray:
  return values.reshape(len(values), -1).max(axis=1)


def _mean(values: np.ndarray) -> np.ndarray:
  return values.reshape(len(values), -1).mean(axis=1)
