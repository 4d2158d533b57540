"""The rows of the study, and the README's tables, made from the .json files beside it."""

from __future__ import annotations

import json
import pathlib
import statistics
from typing import Any

from experiments.common import study as common
from experiments.common import sweep, tables
from experiments.common.dots import dot_file
from experiments.common.sweep import Row

HERE = pathlib.Path(__file__).resolve().parent
README = HERE / "README.md"
MODELS = ("quickstart", "desk")
# A row is also the name of the file that keeps its result.
ROWS = {
  "quickstart": Row("configs/quickstart.py"),
  "quickstart_seed1": Row("configs/quickstart.py", {"seed": 1}),
  "dense_quickstart": Row("configs/dense_baseline.py:quickstart"),
  "dense_quickstart_seed1": Row("configs/dense_baseline.py:quickstart", {"seed": 1}),
  "desk": Row("configs/desk.py"),
  "dense_desk": Row("configs/dense_baseline.py:desk"),
}
RUNGS = ("unigram", "bigram", "trigram", "4-gram", "5-gram", "lzma")
KEPT = (
  "config",
  "seed",
  "steps",
  "tokens",
  "wall_seconds",
  "bits_per_byte",
  "ladder",
  "parameters",
  "flops_per_token",
  "data",
  "hardware",
  "python",
  "versions",
  "commit",
  "sample",
)


def train(job: common.Job) -> None:
  """Trains the rows that have no file here, and keeps their results as files."""
  if not job.tracked:
    common.train(job)
    return
  missing = {name: row for name, row in job.rows.items() if not _file(name).exists()}
  sweep.run(
    missing,
    job.workdir / "results.jsonl",
    job.workdir,
    job.processes,
    devices=job.devices,
    report=job.report,
  )
  for name in missing:
    if (job.workdir / name / "results.json").exists():
      keep(job.workdir / name)


def keep(workdir: pathlib.Path) -> None:
  """Copies a run's results to `<name of the workdir>.json`, without the paths in it."""
  results = json.loads((workdir / "results.json").read_text())
  text = json.dumps({key: results[key] for key in KEPT}, indent=2)
  _file(workdir.name).write_text(text + "\n")


def load_rows(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns row -> its result, of the rows that have a file."""
  files = {name: folder / f"{name}.json" for name in ROWS}
  return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def _file(name: str) -> pathlib.Path:
  return HERE / f"{name}.json"


def load(name: str) -> list[dict[str, Any]]:
  """Returns the results of `<name>.json` and of each `<name>_seed<n>.json`, ordered by seed."""
  runs = [
    json.loads(path.read_text())
    for path in [*HERE.glob(f"{name}.json"), *HERE.glob(f"{name}_seed*.json")]
  ]
  return sorted(runs, key=lambda run: run["seed"])


def table(name: str) -> str:
  """Returns the Markdown table of a model.

  A row is a domain. The columns are the model's seeds, those of its dense twin, and the rungs of
  the ladder of n-grams and LZMA.
  """
  runs, twins = load(name), load(f"dense_{name}")
  columns = [f"{name}, seed {r['seed']}" for r in runs] + [
    f"dense twin, seed {r['seed']}" for r in twins
  ]
  cells = []
  for domain, ladder in runs[0]["ladder"].items():
    values = [r["bits_per_byte"][domain] for r in runs + twins] + [ladder[rung] for rung in RUNGS]
    cells.append([domain.removeprefix("embedded:")] + [f"{v:.3f}" for v in values])
  about = [
    f"{r['steps']} steps, {r['tokens'] / 1e6:.1f}M tokens, {r['wall_seconds'] / 60:.1f} min"
    for r in runs + twins
  ]
  notes = "; ".join(f"{column}: {text}" for column, text in zip(columns, about, strict=True))
  first = runs[0]
  about = (
    f"The table shows bits per byte on held-out documents; lower is better. The runs: {notes}. "
    f"They were made with Python {first['python']}, {tables.versions(first)} on "
  )
  distances = (
    f" The difference between {name}, seed {first['seed']}, and the 5-gram is "
    f"{_minus(first, '5-gram')}; between it and LZMA it is {_minus(first, 'lzma')}."
  )
  made = tables.markdown(["domain", *columns, *RUNGS], cells)
  return "\n".join([made, "", about + f"{first['hardware']}." + distances])


def figure() -> str:
  """Returns an SVG of the models, their dense twins and the ladder, by model and domain."""
  lines = {}
  for model in MODELS:
    for domain, ladder in load(model)[0]["ladder"].items():
      means = {
        label: statistics.fmean(run["bits_per_byte"][domain] for run in runs)
        for label, runs in (("experts", load(model)), ("dense twin", load(f"dense_{model}")))
        if runs
      }
      rungs = {rung: ladder[rung] for rung in ("trigram", "5-gram", "lzma")}
      lines[f"{model}, {domain.removeprefix('embedded:')}"] = means | rungs
  return dot_file(
    "Two small models and the ladder of baselines, mean over the seeds",
    lines,
    "bits per byte on held-out documents",
    bold=("experts", "dense twin"),
  )


def draw() -> None:
  """Writes the figure."""
  (HERE / "ladder.svg").write_text(figure())


def _minus(run: dict, rung: str) -> str:
  return ", ".join(
    f"{run['bits_per_byte'][domain] - ladder[rung]:+.3f} ({domain.removeprefix('embedded:')})"
    for domain, ladder in run["ladder"].items()
  )
