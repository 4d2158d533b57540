"""Makes the README's tables, table.csv and table.json of a scale from its results.jsonl."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from typing import Any

from experiments.common import journal
from experiments.common import tables as common
from experiments.compare_routers import figures, measures, study

HERE = pathlib.Path(__file__).resolve().parent
# The folder of each scale's results, tables and figures.
FOLDERS = {"desk": HERE, "gpu": HERE / "gpu"}
RESULTS = "results.jsonl"
NONE = "The study has not been run to its end yet: there is no line of results."

Summary = dict[str, dict[str, Any]]


def tables(scale: str) -> dict[str, str]:
  """Returns the tables of a scale's README, by marker."""
  return {HERE.name: text(load(scale), scale)}


def write_files(scale: str) -> None:
  """Writes table.csv, table.json and the figures of a scale that has results."""
  folder, lines = FOLDERS[scale], load(scale)
  summary = measures.summary(lines)
  (folder / "table.csv").write_text(as_csv(summary))
  (folder / "table.json").write_text(as_json(lines, summary))
  figures.write(lines, folder)


def load(scale: str) -> measures.Lines:
  """Returns the lines of results of a scale in the order of the study's rows."""
  lines = journal.load(FOLDERS[scale] / RESULTS)
  return {name: lines[name] for name in study.rows(scale) if name in lines}


def as_csv(summary: Summary) -> str:
  """Returns CSV with a line for each row; a cell is empty if the row does not have the figure."""
  buffer = io.StringIO()
  writer = csv.DictWriter(buffer, ["row", *next(iter(summary.values()))], lineterminator="\n")
  writer.writeheader()
  for name, row in summary.items():
    writer.writerow({"row": name} | {key: _short(value) for key, value in row.items()})
  return buffer.getvalue()


def as_json(lines: measures.Lines, summary: Summary) -> str:
  """Returns JSON of the figures of all rows, and of the differences of all pairs of rows.

  Returns:
    {"rows": row -> figures, "pairs": [{"row", "minus", "mean", "se", "exceeds_seeds_spread"}]}.
  """
  pairs = [
    {
      "row": a,
      "minus": b,
      "mean": _short(d.mean),
      "se": _short(d.error),
      "exceeds_seeds_spread": d.exceeds,
    }
    for (a, b), d in measures.pairs(lines).items()
  ]
  rows = {name: {key: _short(value) for key, value in row.items()} for name, row in summary.items()}
  return (
    '{"rows": {\n'
    + ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    + '\n},\n"pairs": [\n'
    + ",\n".join(f" {json.dumps(pair)}" for pair in pairs)
    + "\n]}\n"
  )


def text(lines: measures.Lines, scale: str) -> str:
  """Returns the README's Markdown.

  It has the quality, routing and cost of each row, the differences between rows, and how the study
  was run.
  """
  if not lines:
    return NONE
  summary = measures.summary(lines)
  missing = [name for name in study.rows(scale) if name not in lines]
  warning = (
    [
      f"**The study has not been run to its end yet: {', '.join(missing)} "
      f"{'is' if len(missing) == 1 else 'are'} missing.**"
    ]
    if missing
    else []
  )
  pictures = "\n".join(f"![{shown}]({name})" for name, shown in figures.FILES.items())
  return "\n\n".join(
    [
      *warning,
      quality(summary),
      routing(summary),
      cost(summary),
      against_dense(summary),
      matrix(lines),
      about(lines),
      pictures,
    ]
  )


def quality(summary: Summary) -> str:
  """Returns the table of losses, and explains the marks at the rows' names."""
  head = (
    "",
    "bits per byte",
    "minus dense",
    "steps to dense's loss",
    "minutes to it",
    "finite seeds",
    "largest logit",
  )
  rows = []
  for name, row in summary.items():
    bold = "**" if row["exceeds_seeds_spread"] else ""
    minutes = row["seconds_to_dense"] and row["seconds_to_dense"] / 60
    rows.append(
      [
        _name(name),
        _pair(row["bits_per_byte"], row["bits_per_byte_se"], ".3f"),
        bold + _pair(row["minus_dense"], row["minus_dense_se"], "+.3f") + bold,
        _number(row["steps_to_dense"], ".0f"),
        _number(minutes, ".1f"),
        f"{row['finite_seeds']}/{row['seeds']}",
        _number(row["logit_max"], ".1f"),
      ]
    )
  marks = "; ".join(f"{mark} {words}" for mark, words in study.MARKS.items())
  return common.markdown(head, rows) + f"\n\n{marks}."


def routing(summary: Summary) -> str:
  """Returns the table of drops, load and entropy of the rows with experts."""
  head = (
    "",
    "a token visits",
    "assignments dropped",
    "tokens without expert",
    "load CV",
    "router entropy",
    "ln E",
  )
  rows = []
  for name, row in summary.items():
    if group := study.group_of(name):
      rows.append(
        [
          _name(name),
          group.title,
          _number(row["drop_rate"], ".1%"),
          _number(row["dropped_tokens"], ".1%"),
          _number(row["load_cv"], ".2f"),
          _number(row["router_entropy"], ".2f"),
          _number(row["ln_experts"], ".2f"),
        ]
      )
  return common.markdown(head, rows)


def cost(summary: Summary) -> str:
  """Returns the table of times, parameters and FLOPs."""
  head = (
    "",
    "step, ms",
    "CPU of a step, ms",
    "over dense",
    "parameters",
    "activated",
    "FLOPs a token",
  )
  rows = [
    [
      _name(name),
      _number(row["step_ms"], ".0f"),
      _number(row["step_cpu_ms"], ".0f"),
      _number(row["step_over_dense"], ".2f"),
      _number(row["parameters"], ",d"),
      _number(row["activated_parameters"], ",d"),
      _number(row["flops_per_token"], ",.0f"),
    ]
    for name, row in summary.items()
  ]
  return common.markdown(head, rows)


def against_dense(summary: Summary) -> str:
  """Returns which rows are below the dense twin, above it, and not told apart from it."""
  routed = {name: row for name, row in summary.items() if row["minus_dense"] is not None}
  told = {name: row for name, row in routed.items() if row["exceeds_seeds_spread"]}
  parts = {
    "Below the dense twin by more than the seeds' spread": [
      n for n in told if told[n]["minus_dense"] < 0
    ],
    "above it by more": [n for n in told if told[n]["minus_dense"] > 0],
    "not told apart from it": [n for n in routed if n not in told],
  }
  return (
    "; ".join(
      f"{what}: {', '.join(f'`{n}`' for n in names) or 'none'}" for what, names in parts.items()
    )
    + "."
  )


def matrix(lines: measures.Lines) -> str:
  """Returns the table of the differences between all pairs of rows, in thousandths of a bit."""
  pairs, names = measures.pairs(lines), list(lines)
  rows = []
  for i, name in enumerate(names[1:], 1):
    cells = [pairs[other, name] for other in names[:i]]
    rows.append(
      [f"`{name}`", *(_thousandths(cell) for cell in cells), *[""] * (len(names) - 1 - i)]
    )
  exceed = [pair for pair in pairs.values() if pair.exceeds]
  strict = sum(pair.errors > measures.T_5_PERCENT for pair in exceed)
  legend = (
    "Row minus column, thousandths of a bit per byte, ± paired standard error; **bold** exceeds "
    f"the seeds' spread: {len(exceed)} of {len(pairs)} pairs, {strict} of them also by "
    f"{measures.T_5_PERCENT} standard errors."
  )
  return common.markdown(("", *(f"`{name}`" for name in names[:-1])), rows) + "\n\n" + legend


def about(lines: measures.Lines) -> str:
  """Returns how the study was run: what all lines share, and the time that they took together."""
  finished = [line for line in lines.values() if "wall_seconds" in line]
  if not finished:
    return "Every seed of every row diverged."
  first, last = finished[0], max(line["date"] for line in finished)
  minutes = sum(line["wall_seconds"] for line in finished) / 60
  return (
    f"{first['seeds']} seeds; {first['steps']} steps of {first['tokens'] // first['steps']} "
    f"tokens. {minutes:.0f} minutes in all. {last}, Python "
    f"{first['python']}, {common.versions(first)}, {first['hardware']}."
  )


def _name(name: str) -> str:
  return f"`{name}`{study.SEES.get(name, '')}"


def _thousandths(cell: measures.Difference) -> str:
  if cell.mean is None:
    return "–"
  bold = "**" if cell.exceeds else ""
  return bold + _pair(-1000 * cell.mean, cell.error and 1000 * cell.error, "+.0f") + bold


def _pair(mean: float | None, error: float | None, form: str) -> str:
  return _number(mean, form) + (f" ± {error:{form.lstrip('+')}}" if error is not None else "")


def _number(value: float | None, form: str) -> str:
  return "–" if value is None else f"{value:{form}}"


def _short(value):
  """Rounds a float to six significant digits."""
  return float(f"{value:.6g}") if isinstance(value, float) else value
