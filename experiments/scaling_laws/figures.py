"""Draws fits: for each law the loss over N with the fitted curves, and the residuals."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.common import plots
from experiments.scaling_laws.fit import Fit
from experiments.scaling_laws.laws import SIZES, Points

MARKERS = ("o", "^", "s", "D", "v", "P", "X")
CURVES = 6  # the largest number of curves in a panel
LETTERS = {"d": "D", "experts": "E"}


def draw(fits: Sequence[Fit], path: pathlib.Path) -> None:
  """Draws a row of panels for each fit.

  Colours stand for tokens, or for experts if the law does not read tokens. Markers stand for
  granularities.
  """
  plt = plots.pyplot()
  figure, axes = plt.subplots(len(fits), 2, figsize=(11, 4.2 * len(fits)), squeeze=False)
  for (left, right), fit in zip(axes, fits, strict=True):
    _panels(plt, left, right, fit)
  plots.save(figure, path)


def _panels(plt, left, right, fit: Fit) -> None:
  ticker = importlib.import_module("matplotlib.ticker")
  points, column = fit.points, "d" if "d" in fit.law.reads else "experts"
  values = np.log(getattr(points, column))
  low, high = values.min(), values.max()

  def colour(value):
    return plt.get_cmap("viridis")(0.92 * (np.log(value) - low) / (high - low))

  rest = 100 * (np.log(points.loss) - np.log(fit.loss(points)[0]))
  fine = np.unique(points.granularity)
  for index, granularity in enumerate(fine):
    mine = points.granularity == granularity
    shape = {
      "marker": MARKERS[index % len(MARKERS)],
      "s": 18,
      "linewidths": 0,
      "zorder": 3,
      "c": colour(getattr(points, column)[mine]),
    }
    left.scatter(points.n[mine], points.loss[mine], **shape)
    if len(fine) > 1:
      left.scatter([], [], marker=shape["marker"], s=18, c="#666", label=f"G = {granularity:g}")
    right.scatter(points.n[mine], rest[mine], **shape)
  n = np.geomspace(points.n.min() / 1.3, points.n.max() * 1.3, 200)
  for level in _levels(getattr(points, column)):
    for granularity, style in list(zip((fine[0], fine[-1]), ("solid", "dashed"), strict=True))[
      : len(fine)
    ]:
      at = {
        "d": points.d[0],
        "experts": points.experts[0],
        "granularity": granularity,
        column: level,
      }
      curve = fit.loss(
        Points(n, *(np.full_like(n, at[c]) for c in ("d", "experts", "granularity")), n)
      )[0]
      left.plot(
        n,
        curve,
        color=colour(level),
        linestyle=style,
        linewidth=1.3,
        label=f"{LETTERS[column]} = {_number(level)}" if style == "solid" else None,
      )
  if len(fine) > 1:
    left.plot([], [], color="#666", linestyle="dashed", linewidth=1.3, label=f"at G = {fine[-1]:g}")
  left.set(title=f"{fit.name}: {fit.law.equation}", ylabel="held-out loss, nats a token")
  left.legend(ncols=2)
  right.axhline(0, color="black", linewidth=0.8)
  right.set(title="what the law leaves over", ylabel="observed minus fitted, % of the loss")
  most = 1.15 * np.abs(rest).max()
  right.set_ylim(-most, most)
  for axis in (left, right):
    axis.set(xscale="log", xlim=(n[0], n[-1]))
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if n[-1] < 500 * n[0] else (1,)))
    axis.xaxis.set_major_formatter(lambda value, _: _number(value))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_xlabel(f"N: {SIZES[fit.law.size]}")
    axis.grid(True)


def _levels(values: np.ndarray) -> np.ndarray:
  """Returns the values that get a curve: all, or `CURVES` of them from smallest to largest."""
  different = np.unique(values)
  return different[np.unique(np.linspace(0, len(different) - 1, CURVES).round().astype(int))]


def _number(value: float) -> str:
  for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if value >= size:
      return f"{value / size:.3g}{letter}"
  return f"{value:.3g}"
