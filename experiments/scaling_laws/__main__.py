"""Fits scaling laws to trained models, and trains grids of models to fit them to; README.md has
question and outcome.

python -m experiments.scaling_laws --fit=FILE    constants with intervals, of a CSV or JSONL file of
points
    --law=NAME             kaplan, chinchilla, clark or krajewski; default: all that the columns
                           allow
    --bootstrap=200        resamples, of which the intervals are; --seed=0 seeds them
    --predict="n=1e9 d=2e10 experts=8 granularity=2"    the loss there, with its interval
    --flops=1e21           the N and D of least loss for that training budget
    --out=DIR              writes fit.json and fit.png
python -m experiments.scaling_laws --scale=desk  trains the grid, then fits; the flags of
experiments/common/sweep.py hold python -m experiments.scaling_laws --scale=paper --print    the commands
of a grid at the papers' sizes, for a pod python -m experiments.scaling_laws --recover     do fits
find the constants that made the points? renews recovery.json python -m experiments.scaling_laws
--write       renews the README's tables
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from experiments.common import sweep
from experiments.scaling_laws import figures, grid, points, recovery
from experiments.scaling_laws import fit as fitting
from experiments.scaling_laws.laws import LAWS, SIZES, Points
from moe_jax.errors import ConfigError, choose
from moe_jax.train import guarded

HERE = pathlib.Path(__file__).resolve().parent
PREDICTED = ("n", "d", "experts", "granularity")


def main(argv: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.scaling_laws",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument("--fit", type=pathlib.Path)
  action.add_argument("--scale", choices=("desk", "paper"))
  action.add_argument("--recover", action="store_true")
  action.add_argument("--write", action="store_true")
  given, rest = parser.parse_known_args(argv)
  if given.scale:
    return _sweep(given.scale, rest)
  try:
    if given.fit:
      _fit(given.fit, _fit_flags(rest))
    elif rest:
      raise ConfigError("experiments.scaling_laws", " ".join(rest), "belongs to --fit or --scale")
    elif given.recover:
      recovery.run(HERE / "recovery.json")
    if given.recover or given.write:
      recovery.write(HERE)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def _sweep(scale: str, rest: Sequence[str]) -> int:
  """Trains what is not finished of a grid; where all of it is, fits what its results allow."""
  rows, results = grid.rows(scale), HERE / f"{scale}.jsonl"
  code = sweep.main(rest, rows, HERE, results.name)
  left = set(rows) - set(sweep.load(results))
  if code or left or "--print" in rest:
    if not code and "--print" not in rest:
      print(f"{len(left)} of {len(rows)} rows are left; the fit is made when all have ended")
    return code
  return main([f"--fit={results}", f"--out={HERE / scale}"])


def _fit_flags(rest: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m experiments.scaling_laws --fit=FILE")
  parser.add_argument("--law", default="")
  parser.add_argument("--bootstrap", type=int, default=200)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--predict", default="")
  parser.add_argument("--flops", type=float)
  parser.add_argument("--out", type=pathlib.Path)
  return parser.parse_args(rest)


def _fit(file: pathlib.Path, given: argparse.Namespace) -> None:
  """Fits, prints, and writes what is asked for."""
  if given.law:
    choose("law", given.law, LAWS)
  if given.bootstrap < 0:
    raise ConfigError("bootstrap", given.bootstrap, "must be 0 or more")
  target = _target(given.predict)
  if given.out:
    figures.need_pyplot()  # said now, not after the fit
  table, fits, found = points.read(file), [], {}
  for name in [given.law] if given.law else LAWS:
    try:
      chosen, note = points.select(table, name)
      fitted = fitting.fit(chosen, name, given.bootstrap, given.seed)
    except ConfigError as error:
      if given.law:
        raise
      print(f"{name}: left out; {error.remedy}\n")
      continue
    fits.append(fitted)
    found[name] = _report(fitted, note, target, given.flops)
  if not fits:
    raise ConfigError("fit", str(file), "allows none of the laws")
  if given.out:
    given.out.mkdir(parents=True, exist_ok=True)
    about = {
      "points": file.name,
      "bootstrap": given.bootstrap,
      "seed": given.seed,
      "level": fitting.LEVEL,
    }
    (given.out / "fit.json").write_text(json.dumps(about | {"laws": found}, indent=2) + "\n")
    figures.draw(fits, given.out / "fit.png")
    print(f"wrote {given.out / 'fit.json'} and {given.out / 'fit.png'}")


def _target(text: str) -> dict[str, float]:
  """`--predict` as column -> value."""
  found = {}
  for part in text.split():
    name, equals, value = part.partition("=")
    choose("predict", name, PREDICTED, shown=part)
    try:
      found[name] = float(value)
    except ValueError as error:
      raise ConfigError("predict", part, f"must be {name}=NUMBER") from error
    if not found[name] > 0:
      raise ConfigError("predict", part, "must be above 0")
  return found


def _report(fitted: fitting.Fit, note: str, target: dict[str, float], flops: float | None) -> dict:
  """Prints a fit, and returns it as JSON."""
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
  """Prints and returns the best division of a budget, at the granularity asked for or the best that
  was trained."""
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
  """Says which columns are extrapolated."""

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


if __name__ == "__main__":
  sys.exit(guarded(sys.argv, None, lambda argv: main(argv[1:])))
