"""The sections of the report. Each is a string of HTML, or "" if the run has nothing to show."""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypedDict

import numpy as np

from moe_jax.layers.zero_experts import WITHOUT_FFN
from moe_jax.report.charts import Level, Line, line_chart, load_map
from moe_jax.report.colours import expert_colour, series_colour
from moe_jax.report.records import (
  Curve,
  Workdir,
  branch,
  curve,
  encoder_layers,
  layer_names,
  measure,
  number,
  page_layers,
  smooth,
  starts,
  thin,
)
from moe_jax.report.routing_page import routing_section
from moe_jax.report.style import CSS, HOVER
from moe_jax.routing.metrics import PERCENTILES

POINTS = 400  # maximum number of points of a line


class _Size(TypedDict):
  """The size of a chart in pixels, as arguments of `line_chart`."""

  width: int
  height: int


SMALL: _Size = {"width": 374, "height": 210}  # the size of charts that stand three in a row
MOST_EVENTS = 50  # maximum number of events that are listed
# The kinds of events in words. The keys are those of metrics.jsonl.
_EVENTS = {
  "nonfinite": "gradients that were not finite",
  "spike": "loss spikes",
  "rollback": "rollbacks",
  "starved": "routers that collapse",
  "shares_kept": "changes of the sources' shares that were left out",
}
LINE_EXPERTS = 3  # With more experts than this, the load is drawn as a map.
_RUNGS = {"lzma": "LZMA"}  # The names of the rungs of the ladder that are not shown by their key.


def page(run: Workdir) -> str:
  """Returns the whole report as an HTML document."""
  layers = layer_names(run)
  body = "".join(
    (
      _header(run, layers),
      _events(run),
      _table(run),
      _loss(run),
      _optimizer(run),
      _load(run, layers),
      _routers(run, layers),
      routing_section(run.routing, layers[: page_layers(run)]),
      _sample(run),
      _config(run),
    )
  )
  return document(f"{_name(run)}: run report", body)


def document(title: str, body: str) -> str:
  """Returns an HTML document with the style sheet of the reports.

  Args:
    title: The title of the page, as plain text.
    body: The content, as HTML.
  """
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    f"<style>{CSS}</style></head><body>{body}<script>{HOVER}</script></body></html>\n"
  )


def _name(run: Workdir) -> str:
  """Returns the name of the config, e.g. `quickstart` for `configs/quickstart.py`."""
  path = str(run.results.get("config") or run.meta.get("config") or run.path.resolve().name)
  name, _, variant = path.rpartition("/")[2].partition(":")
  return PurePath(name).stem + (f" ({variant})" if variant else "")


def _header(run: Workdir, layers: Sequence[str]) -> str:
  """Returns the title, the facts about the run, a banner if it is not finished, and the tiles."""
  start = ([{}, *starts(run.meta)])[-1]
  packages = branch(run.results, "versions") or branch(start, "packages")
  commit = start.get("commit")
  facts = [
    str(start.get("time", ""))[:16].replace("T", " ") + (" UTC" if start.get("time") else ""),
    f"seed {run.results.get('seed', run.config.get('seed'))}",
    run.results.get("hardware") or start.get("devices"),
    f"Python {run.results.get('python') or start.get('python', '?')}"
    if run.results or start
    else "",
    ", ".join(f"{name} {packages[name]}" for name in ("jax", "flax", "optax") if name in packages),
    f"commit {commit[:10]}" if isinstance(commit, str) else "",
  ]
  line = " · ".join([*(html.escape(str(fact)) for fact in facts if fact), *_paper_link(run)])
  done = max([number(lines[-1]["step"]) for lines in (run.train, run.eval) if lines], default=0.0)
  wanted = number(branch(run.config, "train").get("steps"))
  banner = ""
  if not run.results and done < wanted:
    banner = f'<p class="banner">This run is not finished: step {done:g} of {wanted:g}.</p>'
  elif not run.results:
    banner = '<p class="banner">This run has no final evaluation (results.json).</p>'
  words = html.escape(_model_words(run, layers))
  return (
    f'<h1>{html.escape(_name(run))}</h1><p class="meta">{line}</p><p '
    f'class="lead">{words}</p>{banner}'
    f"{_tiles(run, done)}"
  )


def _paper_link(run: Workdir) -> list[str]:
  """Returns a link to the paper of the model, or nothing if the config names none."""
  paper = branch(run.config, "paper")
  arxiv = str(paper.get("arxiv", ""))
  if not re.fullmatch(r"[\w./-]+", arxiv):
    return []
  name = html.escape(str(paper.get("name") or "paper"))
  return [f'<a href="https://arxiv.org/abs/{arxiv}">{name}, arXiv {arxiv}</a>']


def _model_words(run: Workdir, layers: Sequence[str]) -> str:
  """Describes the model in one phrase, as far as the config does."""
  model, moe = branch(run.config, "model"), branch(run.config, "model", "moe")
  if not model:
    return ""
  encoder = f"{encoder_layers(model)} encoder and " if encoder_layers(model) else ""
  depth = f"{encoder}{model.get('num_layers')} {'decoder ' if encoder else ''}layers"
  words = f"{depth}, width {model.get('d_model')}"
  if not moe.get("num_experts"):
    return words + ", dense"
  router = str(branch(moe, "router").get("name"))
  options = ", ".join(f"{k} = {v}" for k, v in branch(moe, "router", router).items())
  factor = moe.get("capacity_factor")
  capacity = "dropless" if factor is None else f"capacity factor {factor}"
  if slots := moe.get("capacity_slots"):
    capacity = f"{slots} slots an expert"
  where = ", ".join(name.rpartition(" ")[2] for name in layers[:8]) + (
    ", …" if len(layers) > 8 else ""
  )
  free = [f"{moe[name]} {name.partition('_')[0]}" for name in WITHOUT_FFN if moe.get(name)]
  beside = f" and {', '.join(free)} without an FFN" if free else ""
  return (
    f"{words}; {moe['num_experts']} experts of width {moe.get('d_ff')}{beside} in layers {where}; "
    f"router {router} ({options}); {capacity}"
  )


def _tiles(run: Workdir, done: float) -> str:
  """Returns the key figures of the run; `done` is the last step in metrics.jsonl."""
  parameters = branch(run.results, "parameters")
  speed = curve(run.train, "tokens_per_second")
  speeds = speed.values[np.isfinite(speed.values)] if speed is not None else []
  tiles = [
    ("parameters", count_words(parameters.get("total"))),
    ("activated per token", count_words(parameters.get("activated"))),
    ("FLOPs per token", count_words(run.results.get("flops_per_token"))),
    ("steps", f"{number(run.results.get('steps', done)):g}"),
    ("training tokens", count_words(run.results.get("tokens"))),
    ("training time", time_words(number(run.results.get("wall_seconds")))),
    ("tokens per second", count_words(np.median(speeds)) if len(speeds) else ""),
  ]
  return (
    '<div class="tiles">'
    + "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles if value)
    + "</div>"
  )


def final_scores(run: Workdir) -> tuple[dict[str, float], str]:
  """Returns the metric that the run is judged by for each source, and where it was measured.

  The scores are those of the final evaluation or, if there was none, of the last evaluation.
  """
  name, _ = measure(run)
  final, prefix = branch(run.results, name), f"{name}/"
  if final:
    # A row of a study with several seeds ends with the evaluation that it had in training.
    key = "eval_batches" if "seeds" in run.results else "final_eval_batches"
    batches = number(branch(run.config, "train").get(key))
    where = (
      f"on {batches:g} batches of each validation split"
      if batches > 0
      else "on the whole validation split"
    )
    return {str(name): number(value) for name, value in final.items()}, where
  for line in reversed(run.eval):
    scores = {
      name.removeprefix(prefix): number(value)
      for name, value in line.items()
      if name.startswith(prefix)
    }
    if scores:
      return scores, f"on the evaluation batches of step {line['step']:g}"
  return {}, ""


def _table(run: Workdir) -> str:
  """Returns a table of the scores beside the ladder, with a mark where the run is below a rung."""
  (key, unit), (scores, where) = measure(run), final_scores(run)
  if not scores:
    return ""
  ladders = {name: branch(run.results, "ladder", name) for name in scores}
  rungs = list(dict.fromkeys(name for ladder in ladders.values() for name in ladder))
  compare = branch(run.results, "compare")
  others, differ = branch(compare, key), compare.get("other_data") or ()
  columns = ["this run"] + [compare.get("label", "compared run")] * bool(others) + rungs
  rows = ""
  for name, value in scores.items():
    cells = [others.get(name)] * bool(others) + [ladders[name].get(rung) for rung in rungs]
    rows += (
      f'<tr><td>{html.escape(name)}</td><td class="run">{_bits(value)}</td>'
      + "".join(
        f"<td{' class=beaten' if value < number(cell) else ''}>{_bits(cell)}{star}</td>"
        for cell, star in zip(
          cells, ["*" * (name in differ)] * bool(others) + [""] * len(rungs), strict=True
        )
      )
      + "</tr>"
    )
  head = "".join(
    f"<th>{html.escape(str(c))}</th>" for c in [unit, *(_RUNGS.get(c, c) for c in columns)]
  )
  words = (
    f"Held-out {unit} {where}; lower is better, ✓ = this run is lower. An n-gram model sees n − 1 "
    "bytes of context; n-grams and LZMA know the same training text."
    if rungs
    else f"Held-out {unit} {where}; lower is better."
  )
  notes = ["* on another version of this text"] * bool(differ) + [compare.get("about", "")]
  below = "".join(f'<p class="note">{html.escape(str(note))}</p>' for note in notes if note)
  table = f'<div class="wide"><table><tr>{head}</tr>{rows}</table>{below}</div>'
  return f'<h2>Result</h2><p class="lead">{words}</p>{table}'


def _events(run: Workdir) -> str:
  """Returns the events of the run: skipped updates, loss spikes, rollbacks, starved experts."""
  if not run.events:
    return ""
  counts = Counter(str(event.get("event")) for event in run.events)
  words = ", ".join(f"{_EVENTS.get(kind, kind)}: {count}" for kind, count in counts.items())
  rows = "".join(
    f"<tr><td>{number(event['step']):g}</td>"
    f"<td>{html.escape(str(event.get('message', '')))}</td></tr>"
    for event in run.events[:MOST_EVENTS]
  )
  more = len(run.events) - MOST_EVENTS
  note = f'<p class="note">and {more} more in metrics.jsonl</p>' if more > 0 else ""
  return (
    f'<h2>Events</h2><p class="lead">{html.escape(words)}</p><div class="wide"><table '
    'class="events"><tr>'
    f"<th>step</th><th>what happened</th></tr>{rows}</table>{note}</div>"
  )


def _loss(run: Workdir) -> str:
  """Returns the charts of the training loss and of the validation score of each source."""
  charts = ""
  train = curve(run.train, "cross_entropy") or curve(run.train, "loss")
  if train is not None and train.values.ndim == 1:
    smoothed = thin(Curve(train.steps, smooth(train.values, len(train.steps) // 40)), POINTS)
    lines = [
      Line("as logged", *thin(train, POINTS), series_colour(0), faint=True),
      Line("smoothed", *smoothed, series_colour(0)),
    ]
    charts += line_chart(
      "Training cross-entropy", lines, note="nats per token; pale: as logged, bold: smoothed"
    )
  key, unit = measure(run)
  names = [name for line in run.eval[-1:] for name in line if name.startswith(f"{key}/")]
  for i, name in enumerate(names):
    source = name.removeprefix(f"{key}/")
    data = curve(run.eval, name)
    rungs = [
      Level(_RUNGS.get(rung, rung), number(value))
      for rung, value in branch(run.results, "ladder", source).items()
    ]
    # The unigram rung is so far above the others that the chart would be mostly empty.
    top = max([level.y for level in rungs if level.label != "unigram"], default=math.inf)
    rungs = [level for level in rungs if level.y <= top]
    if data is not None and data.values.ndim == 1:
      charts += line_chart(
        f"Validation: {source}",
        [Line(source, *thin(data, POINTS), series_colour(i))],
        levels=rungs,
        note=unit,
        top=top + 0.5 if np.nanmin(data.values, initial=math.inf) < top else math.inf,
      )
  charts += _auxiliary(run) + _shares(run)
  return f'<h2>Loss</h2><div class="figures two">{charts}</div>' if charts else ""


def _auxiliary(run: Workdir) -> str:
  """Returns the chart of the auxiliary losses as they enter the training loss."""
  moe, lines = branch(run.config, "model", "moe"), []
  for key, weight in moe.items():
    name, is_loss, _ = str(key).rpartition("_loss")
    data = curve(run.train, name) if is_loss and number(weight) > 0 else None
    if data is not None and data.values.ndim == 1:
      data = thin(data, POINTS)
      colour = series_colour(len(lines))
      lines.append(
        Line(f"{name} × {number(weight):g}", data.steps, number(weight) * data.values, colour)
      )
  note = f"nats, as they enter the loss: {', '.join(line.label for line in lines)}"
  return line_chart("Auxiliary losses", lines, note=note, bottom=0.0)


def _shares(run: Workdir) -> str:
  """Returns the chart of the shares of the sources after each change, or "" if there was none."""
  lines, prefix = [], "share/"
  for name in [name for line in run.mixture[-1:] for name in line if name.startswith(prefix)]:
    data = curve(run.mixture, name)
    if data is not None and data.values.ndim == 1:
      label, colour = name.removeprefix(prefix), series_colour(len(lines))
      lines.append(Line(label, *thin(data, POINTS), colour))
  return line_chart(
    "Shares of the sources", lines, note="of the batches that follow each change", bottom=0.0
  )


def _optimizer(run: Workdir) -> str:
  """Returns the charts of the learning rate, the gradient norm and the speed."""
  charts = ""
  for name, title, log in (
    ("learning_rate", "Learning rate", False),
    ("grad_norm", "Gradient norm", True),
    ("tokens_per_second", "Tokens per second", False),
  ):
    data = curve(run.train, name)
    if data is not None and data.values.ndim == 1:
      note = "before clipping" if name == "grad_norm" else ""
      charts += line_chart(
        title,
        [Line(title, *thin(data, POINTS), series_colour(0))],
        log=log,
        note=note,
        **SMALL,
        bottom=None if log else 0.0,
      )
  return f'<h2>Optimization</h2><div class="figures">{charts}</div>' if charts else ""


def _load(run: Workdir, layers: Sequence[str]) -> str:
  """Returns a chart of the experts' load for each layer.

  It has a line for each expert, or is a map if there are more than `LINE_EXPERTS` experts.
  """
  data = curve(run.train, "moe/load")
  if data is None or data.values.ndim != 3:
    return ""
  _, count, experts = data.values.shape
  # All charts together have about 60,000 points, which keeps the file small.
  data = thin(data, int(np.clip(60_000 / (count * experts), 40, 300)))
  charts = ""
  for i in range(count):
    load = data.values[:, i]
    if experts <= LINE_EXPERTS:
      lines = [Line(str(e), data.steps, load[:, e], expert_colour(e)) for e in range(experts)]
      charts += line_chart(layers[i], lines, levels=[Level("1/E", 1 / experts)], bottom=0.0)
    else:
      charts += load_map(layers[i], data.steps, load)
  words = (
    "The fraction of a layer's assignments that each expert gets; 1/E is perfect balance."
    if experts <= LINE_EXPERTS
    else "Load as a multiple of the uniform share 1/E: blue experts starve, brown ones are crowded."
  )
  figures = f'<div class="figures two">{charts}</div>'
  return f'<h2>Load of the experts</h2><p class="lead">{words}</p>{figures}'


# The charts of the routers, as metric -> (title, note). A metric is an array with an entry for each
# of the Lm layers with experts, or one number if it is a loss.
_ROUTER_CHARTS: Mapping[str, tuple[str, str]] = {
  "moe/drop_rate": ("Drop rate", "assignments beyond capacity, of all"),
  "moe/ffn_experts_a_token": (
    "Experts with an FFN per token",
    "mean over tokens; others cost nothing",
  ),
  "moe/zero_share": ("Share of experts without an FFN", "assignments that cost nothing, of all"),
  "moe/entropy": ("Router entropy", "nats, mean over tokens; ln E = undecided"),
  "moe/max_violation": ("Maximum violation", "load of the fullest expert × E − 1; 0 = balanced"),
  "moe/load_percentiles": (
    "Load percentiles",
    "of all experts of all layers, as multiples of an even load; 1 = balanced",
  ),
  "moe/device_overload": (
    "Overload of devices",
    "load of the busiest device as a multiple of an even load; 1 = balanced",
  ),
  "balance": ("Balance loss", "unweighted; 1 = balanced, E = all tokens to one expert"),
  "z": ("Router z-loss", "unweighted; mean of (log Σ exp logits)²"),
  "moe/logit_max": ("Largest router logit", ""),
  "importance": ("Importance loss", "unweighted; squared coefficient of variation, 0 = balanced"),
  "load": ("Load loss", "unweighted; squared coefficient of variation, 0 = balanced"),
}


# The charts whose axis begins at 0.
_FROM_ZERO = ("moe/drop_rate", "moe/entropy", "moe/max_violation", "moe/load_percentiles", "z")


def _routers(run: Workdir, layers: Sequence[str]) -> str:
  """Returns the charts of the router metrics and of the auxiliary losses."""
  load = curve(run.train, "moe/load")
  experts = load.values.shape[-1] if load is not None and load.values.ndim == 3 else 0
  levels = {
    "moe/entropy": [Level("ln E", math.log(experts))] if experts else [],
    "balance": [Level("balanced", 1.0)],
  }
  charts = ""
  for name, (title, note) in _ROUTER_CHARTS.items():
    data = curve(run.train, name)
    if data is None or data.values.ndim > 2:
      continue
    data = thin(data, POINTS)
    columns = data.values.reshape(len(data.steps), -1).T
    names: Sequence[str] = [str(i) for i in range(len(columns))]
    if name == "moe/load_percentiles":
      names = [f"{percentile} %" for percentile in PERCENTILES]
    elif data.values.ndim == 2 and len(layers) == len(columns):
      names = layers
    lines = [Line(names[i], data.steps, y, series_colour(i)) for i, y in enumerate(columns)]
    bottom = 0.0 if name in _FROM_ZERO else None
    charts += line_chart(
      title, lines, note=note, levels=levels.get(name, []), bottom=bottom, **SMALL
    )
  return f'<h2>Routers</h2><div class="figures">{charts}</div>' if charts else ""


def _sample(run: Workdir) -> str:
  """Returns the text that the trained model wrote."""
  sample = run.results.get("sample")
  if not isinstance(sample, str) or not sample:
    return ""
  words = "What the model writes as the start of a document."
  return f'<h2>Sample</h2><p class="lead">{words}</p><pre>{html.escape(sample)}</pre>'


def _config(run: Workdir) -> str:
  """Returns the last command, the fingerprints of the data, and all keys of the config."""
  if not run.config:
    return ""
  command = "".join(
    f"<pre>{html.escape(str(start['command']))}</pre>"
    for start in starts(run.meta)[-1:]
    if "command" in start
  )
  data = json.dumps(run.config, indent=2, ensure_ascii=False)
  rows = "".join(
    f"<tr><td>{html.escape(str(k))}</td><td><code>{html.escape(str(v)[:16])}</code></td></tr>"
    for k, v in branch(run.meta, "data").items()
  )
  table = f"<table><tr><th>source</th><th>SHA-256</th></tr>{rows}</table>" if rows else ""
  return (
    f"<h2>Configuration</h2>{command}{table}<details><summary>All keys, resolved</summary>"
    f"<pre>{html.escape(data)}</pre></details>"
  )


def _bits(value: Any) -> str:
  """Returns a score with three decimals, or a dash if there is none."""
  return f"{number(value):.3f}" if math.isfinite(number(value)) else "–"


def count_words(value: Any) -> str:
  """Returns a count in short form, e.g. "1.23 M" for 1234567, or "" if it is not finite."""
  value = number(value)
  if not math.isfinite(value):
    return ""
  for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= unit:
      return f"{value / unit:.3g} {letter}"
  return f"{value:g}"


def time_words(seconds: float) -> str:
  """Returns a duration in seconds, minutes or hours, or "" if it is not finite."""
  if not math.isfinite(seconds):
    return ""
  if seconds < 100:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
