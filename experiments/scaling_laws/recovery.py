"""Tests whether fits find the constants of points that the published laws made.

The points have noise and cover the ranges of the papers.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy

from experiments.common import tables as markers
from experiments.scaling_laws import fit as fitting
from experiments.scaling_laws.laws import LAWS, Points

NOISE = 0.003  # standard deviation of ln L about the law: 0.01 nats at a loss of 3
SEEDS = 10
BOOTSTRAP = 100
# The law, and the number of points of seed 0, that are also fitted from all starts of the grid.
ALL_STARTS, COMPARED = "chinchilla", 80
BUDGET = 5.76e23  # FLOPs, those of Gopher and Chinchilla


def _every(n, d, experts, granularity) -> Points:
  grid = np.array(np.meshgrid(n, d, experts, granularity, indexing="ij"), float).reshape(4, -1)
  return Points(*grid, np.ones(grid.shape[1]))


def _scattered(count: int, n: tuple[float, float], d: tuple[float, float]) -> Points:
  random = np.random.default_rng(0)

  def draw(low, high):
    return np.exp(random.uniform(np.log(low), np.log(high), count))

  return Points(draw(*n), draw(*d), *np.ones((3, count)))


# The points at which losses are taken. All ranges are those of the papers. Hoffmann et al. trained
# over 400 models; the numbers of points of the other laws are ours.
DESIGNS = {
  "kaplan": _every(np.geomspace(1e3, 1.5e9, 7), np.geomspace(2.2e7, 2.3e10, 7), 1, 1),
  "chinchilla": _scattered(400, (7e7, 1.6e10), (5e9, 5e11)),
  "clark": _every(
    (1.5e7, 2.5e7, 5.5e7, 1.3e8, 3.7e8, 8.7e8, 1.3e9), 1.3e11, 2.0 ** np.arange(10), 1
  ),
  "krajewski": _every(
    (1.35e8, 4.56e8, 1.08e9, 3.65e9), (1.6e10, 3.3e10, 6.6e10, 1.3e11), 64, (1, 2, 4, 8, 16)
  ),
}
# Points beyond these ranges, at which the loss is predicted.
TARGETS = {
  "kaplan": _every(1e10, 1e11, 1, 1),
  "chinchilla": _every(7e10, 1.4e12, 1, 1),
  "clark": _every(1e10, 1.3e11, 64, 1),
  "krajewski": _every(1e10, 3e11, 64, 8),
}


def sample(name: str, noise: float, seed: int) -> Points:
  """Returns the law's design with the losses of the paper's constants times exp(noise * normal)."""
  law, points = LAWS[name], DESIGNS[name]
  log_loss = law.log_loss(points, *next(iter(law.published.values())))
  return points._replace(
    loss=np.exp(log_loss + noise * np.random.default_rng(seed).normal(size=len(log_loss)))
  )


def recover(
  name: str, seeds: int = SEEDS, bootstrap: int = BOOTSTRAP, each: Callable = map
) -> dict[str, Any]:
  """Fits points without noise and with the noise of each seed.

  Args:
    name: A key of `LAWS`.
    seeds: The number of seeds.
    bootstrap: The number of resamples of each fit.
    each: `map`, or the map of a pool of processes.

  Returns:
    The published constants, those found without noise, those found for seed 0 with their intervals,
    and for each constant the number of seeds whose interval holds the published value.
  """
  law = LAWS[name]
  published = dict(zip(law.constants, next(iter(law.published.values())), strict=True))
  exact = {
    key: value
    for key, (value, *_) in fitting.fit(sample(name, 0.0, 0), name, 0).constants().items()
  }
  truth = float(np.exp(law.log_loss(TARGETS[name], *published.values()))[0])
  inside, first = dict.fromkeys((*published, "loss"), 0), {}
  for found in each(functools.partial(_noisy, name, bootstrap), range(seeds)):
    for key, (_, low, high) in found.items():
      inside[key] += low <= (published | {"loss": truth})[key] <= high
    first = first or {"found": found}
  return {
    "points": len(DESIGNS[name].n),
    "published": published | {"loss": truth},
    "exact": exact,
    "inside": inside,
    **first,
  }


def _noisy(name: str, bootstrap: int, seed: int) -> dict[str, tuple[float, float, float]]:
  """Returns the constants and the predicted loss of a fit to one seed's points.

  Each is (value, lower end, upper end of the interval).
  """
  fitted = fitting.fit(sample(name, NOISE, seed), name, bootstrap, seed)
  return fitted.constants() | {"loss": tuple(fitted.loss(TARGETS[name])[:, 0].tolist())}


def run(path: pathlib.Path) -> None:
  """Recovers all laws with one process per core, and writes the results as JSON."""
  start, laws = time.perf_counter(), {}
  with concurrent.futures.ProcessPoolExecutor(
    mp_context=multiprocessing.get_context("fork")
  ) as pool:
    for name in LAWS:
      laws[name] = recover(name, each=pool.map)
      print(f"{name}, {time.perf_counter() - start:.0f} s", flush=True)
  starts = int(np.prod([len(values) for values in LAWS[ALL_STARTS].starts]))
  some = sample(ALL_STARTS, NOISE, 0).of(slice(COMPARED))
  ends = [
    fitting.fit(some, ALL_STARTS, 0, descents=count).objective
    for count in (fitting.DESCENTS, starts)
  ]
  results = {
    "noise": NOISE,
    "seeds": SEEDS,
    "bootstrap": BOOTSTRAP,
    "level": fitting.LEVEL,
    "laws": laws,
    "all_starts": {
      "law": ALL_STARTS,
      "starts": starts,
      "descents": fitting.DESCENTS,
      "points": COMPARED,
      "objectives": ends,
    },
    "seconds": time.perf_counter() - start,
    "hardware": f"{os.cpu_count()} {platform.machine()} CPUs",
    "versions": {
      "python": platform.python_version(),
      "numpy": np.__version__,
      "scipy": scipy.__version__,
    },
  }
  path.write_text(
    "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in results.items()) + "\n}\n"
  )


def table(results: dict[str, Any]) -> str:
  """Returns the Markdown table of recovery.json."""
  lines = [
    "| law | points | constant | published | without noise | with noise, seed 0 | interval | held "
    "it |",
    "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
  ]
  for name, law in results["laws"].items():
    for key, (value, low, high) in law["found"].items():
      head = [name, str(law["points"])] if key == next(iter(law["found"])) else ["", ""]
      words = "loss beyond" if key == "loss" else key
      exact = f"{law['exact'][key]:.6g}" if key in law["exact"] else ""
      lines.append(
        "| "
        + " | ".join(
          [
            *head,
            words,
            f"{law['published'][key]:.6g}",
            exact,
            f"{value:.4g}",
            f"{low:.4g} to {high:.4g}",
            f"{law['inside'][key]}/{results['seeds']}",
          ]
        )
        + " |"
      )
  every, versions = (
    results["all_starts"],
    ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
  )
  few, many = every["objectives"]
  lines += [
    "",
    f"Noise: {100 * results['noise']:g} % of the loss. Intervals: {results['level']:g} %, "
    "percentiles of "
    f'{results["bootstrap"]} resamples. "held it": seeds whose interval holds the published value. '
    '"loss beyond": predicted where no point is: '
    + "; ".join(_target(name) for name in results["laws"])
    + f". Descent from all {every['starts']} starts of the paper's grid ends at an objective of "
    f"{many:.8g}, from the best {every['descents']} at {few:.8g} ({every['law']}, "
    f"{every['points']} points of seed 0). "
    f"{results['seconds']:.0f} s on {results['hardware']}; {versions}.",
  ]
  return "\n".join(lines)


def _target(name: str) -> str:
  at = TARGETS[name]
  letters = {"n": "N", "d": "D", "experts": "E", "granularity": "G"}
  return f"{name} at " + ", ".join(
    f"{letters[key]} {getattr(at, key)[0]:.3g}" for key in LAWS[name].reads
  )


def budget_table() -> str:
  """Returns a table of how the published constants of Chinchilla's law divide `BUDGET`."""
  law = LAWS["chinchilla"]
  lines = ["| constants of `chinchilla` | N | D | loss |", "| --- | ---: | ---: | ---: |"]
  for source, constants in law.published.items():
    published = fitting.Fit(
      "chinchilla",
      DESIGNS["chinchilla"],
      np.array(law.coordinates(constants)),
      np.empty((0, 5)),
      0.0,
      1.0,
    )
    n, d, loss = (value for value, *_ in fitting.divide(published, BUDGET, 1.0, 1.0).values())
    lines.append(f"| {source} | {n / 1e9:.3g}B | {d / 1e12:.3g}T | {loss:.3f} |")
  return "\n".join(lines)


def desk_table(folder: pathlib.Path) -> str:
  """Returns the table of desk/fit.json, or a sentence if there is no such file."""
  path = folder / "desk" / "fit.json"
  if not path.exists():
    return "The grid has not been run yet."
  lines = [
    "| law | points | constant | at a desk | interval | published |",
    "| --- | --- | --- | ---: | ---: | ---: |",
  ]
  for name, law in json.loads(path.read_text())["laws"].items():
    published = dict(
      zip(LAWS[name].constants, next(iter(LAWS[name].published.values())), strict=True)
    )
    for key, (value, low, high) in law["constants"].items():
      head = [name, law["points"]] if key == next(iter(published)) else ["", ""]
      cells = [*head, key, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{published[key]:g}"]
      lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def tables(folder: pathlib.Path) -> dict[str, str]:
  """Returns the README's tables by marker."""
  return {
    "recovery": table(json.loads((folder / "recovery.json").read_text())),
    "budget": budget_table(),
    "desk": desk_table(folder),
  }


def write(folder: pathlib.Path) -> None:
  """Renews the README's tables."""
  markers.write(folder / "README.md", tables(folder))
