"""Each family's desk model and its dense twin; README.md beside this file has the question and the
outcome.

python -m experiments.desk_twins           trains what is not finished (experiments/common/sweep.py has the
flags) python -m experiments.desk_twins --write   puts the table into this README and the main one
"""

import pathlib
import statistics
import sys

from configs.dense_baseline import FAMILIES
from experiments.common import sweep
from moe_jax.routers import replace
from moe_jax.train import guarded

HERE = pathlib.Path(__file__).resolve().parent
READMES = (HERE / "README.md", HERE.parent.parent / "README.md")
ROWS = {
  name: sweep.Row(config)
  for family in FAMILIES
  for name, config in (
    (family, f"configs/{family}.py:desk"),
    (f"dense_{family}", f"configs/dense_baseline.py:{family}"),
  )
}
MEASURES = {"bits_per_byte": "bits per byte", "nats_per_target": "nats a target"}


def table(done: dict[str, dict]) -> str:
  """Markdown of the families of which both runs are there: experts minus dense, in each domain and
  on average."""
  pairs = {
    family: (done[family], done[f"dense_{family}"])
    for family in FAMILIES
    if {family, f"dense_{family}"} <= done.keys()
  }
  if not pairs:
    return "No pair of runs is finished."
  domains = list(next(iter(pairs.values()))[0]["loss"])
  lines = [
    "| family | parameters, activated | "
    + " | ".join(d.removeprefix("embedded:") for d in domains)
    + " | dense twin, mean | experts, mean | difference |",
    "|---|---:|" + "---:|" * (len(domains) + 3),
  ]
  for family, runs in pairs.items():
    lines.append(_row(family, *runs, domains))
  first = next(iter(pairs.values()))[0]
  versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("jax", "flax"))
  return "\n".join(
    [
      *lines,
      "",
      "Held out: bits per byte, or nats a target (*) of span corruption; one seed; "
      f"{first['steps']} steps of {first['tokens'] // first['steps']} target tokens, decoders. "
      f"Python {first['python']}, {versions}, {first['hardware']}.",
    ]
  )


def _row(family: str, experts: dict, dense: dict, domains: list[str]) -> str:
  measure = next(name for name in MEASURES if name in experts)
  pair = [[run[measure][domain] for domain in domains] for run in (dense, experts)]
  means = [statistics.fmean(values) for values in pair]
  parameters = experts["parameters"]
  star = "" if measure == "bits_per_byte" else "*"
  cells = [
    f"`{family}`{star}",
    f"{parameters['total'] / 1e6:.2f}M, {parameters['activated'] / 1e6:.2f}M",
    *(f"{b - a:+.3f}" for a, b in zip(*pair, strict=True)),
    *(f"{mean:.3f}" for mean in means),
    f"**{means[1] - means[0]:+.3f}**",
  ]
  return "| " + " | ".join(cells) + " |"


def write(text: str) -> None:
  """Puts the table between the markers of both READMEs."""
  for file in READMES:
    file.write_text(replace(file.read_text(), "desk_twins", text))


def main(argv: list[str]) -> int:
  """Does what the command line says; returns the exit code."""
  if argv != ["--write"]:
    return sweep.main(argv, ROWS, HERE)
  write(table(sweep.load(HERE / "results.jsonl")))
  return 0


if __name__ == "__main__":
  sys.exit(guarded(sys.argv, None, lambda argv: main(argv[1:])))
