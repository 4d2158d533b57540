"""The rows of the study and its table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from configs.dense_baseline import FAMILIES
from experiments.common import tables
from experiments.common.dots import dot_file
from experiments.common.findings import OPEN, Finding
from experiments.common.sweep import Row

ROWS = {
  name: Row(config)
  for family in FAMILIES
  for name, config in (
    (family, f"configs/{family}.py:desk"),
    (f"dense_{family}", f"configs/dense_baseline.py:{family}"),
  )
}
MEASURES = {"bits_per_byte": "bits per byte", "nats_per_target": "nats per target"}


def baseline(scale: str, row: str) -> str:
  """Returns the dense twin of a row with experts."""
  return f"dense_{row}" if row in FAMILIES else ""


def table(done: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns Markdown of the families of which both runs are finished.

  A row shows experts minus dense twin in each domain and on average.

  Args:
    done: Row -> its line of results.
  """
  pairs = {
    family: (done[family], done[f"dense_{family}"])
    for family in FAMILIES
    if {family, f"dense_{family}"} <= done.keys()
  }
  if not pairs:
    return "No pair of runs is finished."
  first = next(iter(pairs.values()))[0]
  domains = list(first["loss"])
  head = [
    "family",
    "parameters, activated",
    *(domain.removeprefix("embedded:") for domain in domains),
    "dense twin, mean",
    "experts, mean",
    "difference",
  ]
  made = tables.markdown(
    head,
    [_cells(family, *runs, domains) for family, runs in pairs.items()],
    "|---|---:|" + "---:|" * (len(domains) + 3),
  )
  return "\n".join(
    [
      made,
      "",
      "The measure on held-out text is bits per byte, or nats per target (*) of span corruption. "
      f"Each run has one seed and {first['steps']} steps; a step of a decoder has "
      f"{first['tokens'] // first['steps']} target tokens. The runs were made with Python "
      f"{first['python']}, {tables.versions(first)} on {first['hardware']}.",
    ]
  )


def figure(done: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns an SVG of the differences between experts and dense twin, by family and domain.

  Args:
    done: Row -> its line of results, with at least one finished pair.
  """
  differences = {}
  for family in FAMILIES:
    if {family, f"dense_{family}"} <= done.keys():
      experts, dense = (done[name] for name in (family, f"dense_{family}"))
      measure = _measure(experts)
      one = {
        domain.removeprefix("embedded:"): experts[measure][domain] - dense[measure][domain]
        for domain in experts[measure]
      }
      name = family if measure == "bits_per_byte" else f"{family}*"
      differences[name] = one | {"mean": statistics.fmean(one.values())}
  return dot_file(
    "Experts minus dense twin, held out: to the left of 0 the experts are ahead",
    dict(sorted(differences.items(), key=lambda item: item[1]["mean"])),
    "bits per byte, or nats per target (*)",
    mark=0.0,
    bold=("mean",),
  )


def findings(done: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
  """Returns the papers' common finding, for docs/findings.md."""
  ahead, pairs = 0, 0
  for family in FAMILIES:
    if {family, f"dense_{family}"} <= done.keys():
      experts, dense = (_mean_of(done[name]) for name in (family, f"dense_{family}"))
      ahead, pairs = ahead + (experts < dense), pairs + 1
  return [
    Finding(
      "GShard, Switch, GLaM, Mixtral and others",
      "A sparse model is better than its dense twin of equal activated FLOPs",
      "–",
      f"{ahead} of {pairs} families",
      OPEN,
      "one seed each, and 1.6M tokens",
    )
  ]


def _mean_of(run: Mapping[str, Any]) -> float:
  """Returns the held-out measure of a run, averaged over domains."""
  return statistics.fmean(run[_measure(run)].values())


def _measure(run: Mapping[str, Any]) -> str:
  """Returns the key of a run's held-out measure."""
  return next(name for name in MEASURES if name in run)


def _cells(
  family: str, experts: Mapping[str, Any], dense: Mapping[str, Any], domains: list[str]
) -> list[str]:
  measure = _measure(experts)
  pair = [[run[measure][domain] for domain in domains] for run in (dense, experts)]
  dense_mean, experts_mean = (statistics.fmean(values) for values in pair)
  parameters = experts["parameters"]
  star = "" if measure == "bits_per_byte" else "*"
  return [
    f"`{family}`{star}",
    f"{parameters['total'] / 1e6:.2f}M, {parameters['activated'] / 1e6:.2f}M",
    *(f"{b - a:+.3f}" for a, b in zip(*pair, strict=True)),
    f"{dense_mean:.3f}",
    f"{experts_mean:.3f}",
    f"**{experts_mean - dense_mean:+.3f}**",
  ]
