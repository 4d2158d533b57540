"""The verb `fit`: fits laws to a table of trained models, and says what they predict."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.common import plots
from experiments.scaling_laws import figures, points
from experiments.scaling_laws import fit as fitting
from experiments.scaling_laws.laws import LAWS, SIZES, Points
from moe_jax.errors import ConfigError, choose

PREDICTED = ("n", "d", "experts", "granularity")


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("file", type=pathlib.Path, help="a CSV or JSONL file of trained models")
  parser.add_argument(
    "--law", default="", help=f"one of {', '.join(LAWS)}; default: all that the columns allow"
  )
  parser.add_argument(
    "--bootstrap", type=int, default=200, help="resamples that make the intervals (%(default)s)"
  )
  parser.add_argument("--seed", type=int, default=0, help="of the resampling (%(default)s)")
  parser.add_argument(
    "--predict",
    default="",
    metavar="POINT",
    help="the point whose loss is predicted, as in 'n=1e9 d=2e10 experts=8 granularity=2'",
  )
  parser.add_argument(
    "--flops", type=float, help="a training budget, for which the N and D of least loss are found"
  )
  parser.add_argument("--out", type=pathlib.Path, help="a folder for fit.json and fit.png")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  fit_file(
    options.file,
    options.law,
    options.bootstrap,
    options.seed,
    options.predict,
    options.flops,
    options.out,
  )
  return 0


def fit_file(
  file: pathlib.Path,
  law: str = "",
  bootstrap: int = 200,
  seed: int = 0,
  predict: str = "",
  flops: float | None = None,
  out: pathlib.Path | None = None,
) -> None:
  """Fits laws to a file of points, prints the fits, and writes them if asked to.

  Args:
    file: A table that `points.read` reads.
    law: A key of `LAWS`. "" means all that the columns allow.
    bootstrap: The number of resamples, >= 0.
    seed: Seeds the resampling.
    predict: Where the loss is predicted, as "COLUMN=NUMBER ...". "" means nowhere.
    flops: A training budget to divide into N and D. None means no division.
    out: The folder that gets fit.json and fit.png. None means that nothing is written.

  Raises:
    ConfigError: A value is wrong, the file has no usable points, or no law can be fitted.
  """
  if law:
    choose("law", law, LAWS)
  if bootstrap < 0:
    raise ConfigError("bootstrap", bootstrap, "must be 0 or more")
  target = _target(predict)
  if out:
    plots.pyplot()  # a missing library is told now, not after the fit
  table, fits, reports = points.read(file), [], {}
  for name in [law] if law else LAWS:
    try:
      chosen, note = points.select(table, name)
      fitted = fitting.fit(chosen, name, bootstrap, seed)
    except ConfigError as error:
      if law:
        raise
      print(f"{name}: left out; {error.remedy}\n")
      continue
    fits.append(fitted)
    reports[name] = _report(fitted, note, target, flops)
  if not fits:
    raise ConfigError("file", str(file), "allows none of the laws, for the reasons above")
  if out:
    out.mkdir(parents=True, exist_ok=True)
    about = {"points": file.name, "bootstrap": bootstrap, "seed": seed, "level": fitting.LEVEL}
    (out / "fit.json").write_text(json.dumps(about | {"laws": reports}, indent=2) + "\n")
    figures.draw(fits, out / "fit.png")
    print(f"wrote {out / 'fit.json'} and {out / 'fit.png'}")


def _target(text: str) -> dict[str, float]:
  """Returns `--predict` as column -> value."""
  point = {}
  for part in text.split():
    name, equals, value = part.partition("=")
    choose("predict", name, PREDICTED, shown=part)
    try:
      point[name] = float(value)
    except ValueError as error:
      raise ConfigError("predict", part, f"must be {name}=NUMBER") from error
    if not point[name] > 0:
      raise ConfigError("predict", part, "must be above 0")
  return point


def _report(fitted: fitting.Fit, note: str, target: dict[str, float], flops: float | None) -> dict:
  """Prints a fit and returns it as JSON."""
  law, constants = fitted.law, fitted.constants()
  published = dict(zip(law.constants, next(iter(law.published.values())), strict=True))
  print(
    f"{fitted.name}: {law.equation} ({law.paper})\n"
    f"  N: {SIZES[law.size]}; {note}\n"
    f"  Huber objective {fitted.objective:.3g}, R^2 of ln L {fitted.r2:.5f}"
  )
  for name, value in constants.items():
    print(f"  {name:8} {_with_interval(value)}   published {published[name]:g}")
  result = {
    "paper": law.paper,
    "points": note,
    "objective": fitted.objective,
    "r2": fitted.r2,
    "constants": constants,
  }
  if target:
    if missing := [column for column in law.reads if column not in target]:
      print(f"  no prediction: --predict names no {' and no '.join(missing)}")
    else:
      at = Points(*(np.array([target.get(column, 1.0)]) for column in PREDICTED), np.ones(1))
      result["predicted"] = {"at": target, "loss": fitted.loss(at)[:, 0].tolist()}
      print(
        f"  loss at {', '.join(f'{k} {v:g}' for k, v in target.items())}: "
        f"{_with_interval(result['predicted']['loss'])}{_beyond(fitted, at)}"
      )
  if flops is not None:
    result["divided"] = _divide(fitted, flops, target)
  print()
  return result


def _divide(fitted: fitting.Fit, flops: float, target: dict[str, float]) -> dict | None:
  """Prints and returns the best division of a budget.

  It is at the granularity of `target`, or else at the best granularity that was trained. None means
  that the law has no division.
  """
  if fitted.law.flops_a_token is None:
    print(f"  no division of {flops:g} FLOPs: the paper has none for this law")
    return None
  experts = target.get("experts", float(fitted.points.experts[0]))
  fine = (
    [target["granularity"]]
    if "granularity" in target
    else np.unique(fitted.points.granularity).tolist()
  )
  divided = {
    granularity: fitting.divide(fitted, flops, experts, granularity) for granularity in fine
  }
  granularity, best = min(divided.items(), key=lambda one: one[1]["loss"][0])
  at = Points(
    *(np.array([value]) for value in (best["n"][0], best["d"][0], experts, granularity, 1.0))
  )
  where = (
    f" with experts {experts:g}, granularity {granularity:g}"
    if "granularity" in fitted.law.reads
    else ""
  )
  print(f"  least loss for {flops:g} FLOPs{where}{_beyond(fitted, at)}:")
  for name, words in (("n", "N"), ("d", "D"), ("loss", "loss")):
    print(f"    {words:6} {_with_interval(best[name])}")
  return {"flops": flops, "experts": experts, "granularity": granularity} | best


def _beyond(fitted: fitting.Fit, at: Points) -> str:
  """Returns words that name the columns in which `at` lies beyond the points, or ""."""

  def inside(values, value):
    return values.min() <= value <= values.max()

  outside = [
    column
    for column in fitted.law.reads
    if not inside(getattr(fitted.points, column), getattr(at, column)[0])
  ]
  return f" (beyond the points in {' and '.join(outside)})" if outside else ""


def _with_interval(value: Sequence[float]) -> str:
  middle, low, high = value
  return f"{middle:<11.5g}" + ("" if np.isnan(low) else f" [{low:.5g}, {high:.5g}]")
