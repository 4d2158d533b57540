"""The README's result tables, made from the `results.json` files beside this script.

python -m experiments.embedded_corpus.table             prints them python -m
experiments.embedded_corpus.table --write     puts them between the README's markers python -m
experiments.embedded_corpus.table --add DIR   keeps DIR/results.json here, for the two above
"""

from __future__ import annotations

import json
import pathlib
import sys

from moe_jax import routers
from moe_jax.train import guarded

HERE = pathlib.Path(__file__).resolve().parent
README = HERE.parent.parent / "README.md"
MODELS = ("quickstart", "desk")
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


def add(workdir: pathlib.Path) -> None:
  """Copies a run's results to `<name of the workdir>.json`, without its paths."""
  results = json.loads((workdir / "results.json").read_text())
  text = json.dumps({key: results[key] for key in KEPT}, indent=2)
  (HERE / f"{workdir.name}.json").write_text(text + "\n")


def load(name: str) -> list[dict]:
  """The results of `<name>.json` and `<name>_seed<n>.json`, as many as there are, in the order of
  their seeds."""
  runs = [
    json.loads(path.read_text())
    for path in [*HERE.glob(f"{name}.json"), *HERE.glob(f"{name}_seed*.json")]
  ]
  return sorted(runs, key=lambda run: run["seed"])


def table(name: str) -> str:
  """One Markdown table: rows are domains; columns the model's seeds, its dense twin, the ladder."""
  runs, twins = load(name), load(f"dense_{name}")
  columns = [f"{name}, seed {r['seed']}" for r in runs] + [
    f"dense twin, seed {r['seed']}" for r in twins
  ]
  lines = [
    _row(["domain", *columns, *RUNGS]),
    _row(["---"] + ["---:"] * (len(columns) + len(RUNGS))),
  ]
  for domain, ladder in runs[0]["ladder"].items():
    values = [r["bits_per_byte"][domain] for r in runs + twins] + [ladder[rung] for rung in RUNGS]
    lines.append(_row([domain.removeprefix("embedded:")] + [f"{v:.3f}" for v in values]))
  about = [
    f"{r['steps']} steps, {r['tokens'] / 1e6:.1f}M tokens, {r['wall_seconds'] / 60:.1f} min"
    for r in runs + twins
  ]
  notes = "; ".join(f"{column}: {text}" for column, text in zip(columns, about, strict=True))
  first = runs[0]
  versions = ", ".join(f"{k} {first['versions'][k]}" for k in ("jax", "flax"))
  about = (
    f"Bits per byte on held-out documents, lower is better. {notes}. "
    f"Python {first['python']}, {versions}, "
  )
  distances = (
    f" {name}, seed {first['seed']}, minus the 5-gram: {_minus(first, '5-gram')}; "
    f"minus LZMA: {_minus(first, 'lzma')}."
  )
  return "\n".join([*lines, "", about + f"{first['hardware']}." + distances])


def _minus(run: dict, rung: str) -> str:
  return ", ".join(
    f"{run['bits_per_byte'][domain] - ladder[rung]:+.3f} ({domain.removeprefix('embedded:')})"
    for domain, ladder in run["ladder"].items()
  )


def _row(cells) -> str:
  return "| " + " | ".join(cells) + " |"


def replace(text: str) -> str:
  """`text` with what lies between each pair of markers made anew."""
  for name in MODELS:
    text = routers.replace(text, name, table(name))
  return text


def main(argv: list[str]) -> int:
  """Does what the command line says; returns the exit code."""
  if argv[:1] == ["--add"]:
    for directory in argv[1:]:
      add(pathlib.Path(directory))
  elif "--write" in argv:
    README.write_text(replace(README.read_text()))
  else:
    print("\n\n".join(table(name) for name in MODELS))
  return 0


if __name__ == "__main__":
  sys.exit(guarded(sys.argv, None, lambda argv: main(argv[1:])))
