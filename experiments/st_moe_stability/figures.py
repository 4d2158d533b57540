"""Draws loss curves of the baseline and of the z-losses, and the router's largest logits."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from experiments.common import plots
from experiments.st_moe_stability import rows
from experiments.st_moe_stability.outcome import Outcome
from experiments.st_moe_stability.stability import WINDOW, running_median

Z_LOSSES = ("z_loss_1e-4", "z_loss_1e-3", "z_loss_1e-2", "z_loss_1e-1")


def draw(outcomes: Mapping[str, Outcome], directory: pathlib.Path) -> None:
  """Writes losses.png and logits.png of the rows that are finished."""
  plt = plots.pyplot()
  colours = plt.get_cmap("tab10").colors
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
  if rows.BASELINE in outcomes:
    for seed in range(len(outcomes[rows.BASELINE].stable)):
      _loss(left, outcomes[rows.BASELINE], seed, colours[seed], f"seed {seed}")
  for name, colour in zip((rows.BASELINE, *Z_LOSSES), colours, strict=False):
    if name in outcomes:
      for seed in range(min(len(outcomes[name].stable), rows.OTHERS)):
        _loss(right, outcomes[name], seed, colour, name if seed == 0 else None)
  left.set(
    title="baseline, without z-loss",
    ylabel=f"cross-entropy, nats, median of {WINDOW} steps",
    yscale="log",
  )
  right.set(title="with router z-losses, three seeds each")
  _finish(figure, (left, right), directory / "losses.png")

  known = rows.ablations(rows.DESK)
  names = [name for name in known if not rows.is_design(name, known) and name in outcomes]
  figure, axis = plt.subplots(figsize=(9, 4.8))
  for i, name in enumerate(names):
    largest = _largest(outcomes[name].logit_curves)
    style = "solid" if i < len(colours) else "dashed"
    axis.plot(
      outcomes[name].steps[: len(largest)],
      largest,
      color=colours[i % len(colours)],
      linewidth=1.1,
      label=name,
      linestyle=style,
    )
  axis.set(
    title="largest router logit, median over the seeds",
    ylabel="largest |logit| of a layer",
    yscale="log",
  )
  _finish(figure, (axis,), directory / "logits.png")


def _loss(axis, outcome: Outcome, seed: int, colour, label: str | None) -> None:
  """Draws the loss of one seed: as a solid line if it was stable, and dotted otherwise."""
  values = np.array([np.nan if value is None else value for value in outcome.losses[seed]])
  # The curve ends before the first loss that is not finite.
  lost = np.flatnonzero(np.isnan(values))
  values = values[: lost[0]] if len(lost) else values
  good = outcome.stable[seed]
  axis.plot(
    outcome.steps[: len(values)],
    running_median(values, WINDOW),
    color=colour,
    linewidth=1.1,
    linestyle="solid" if good else (0, (2, 1)),
    label=label and label + " (unstable)" * (not good),
  )


def _largest(curves: Sequence[Sequence[float | None]]) -> Float[np.ndarray, "T"]:
  """Returns the running median of the median over seeds.

  It is NaN where it would be 0, which is so for dead models and has no place on a log scale.
  """
  values = np.array([[np.nan if value is None else value for value in curve] for curve in curves])
  largest = running_median(np.nanmedian(values, axis=0), WINDOW)
  return np.where(largest > 0, largest, np.nan)


def _finish(figure, axes, path: pathlib.Path) -> None:
  for axis in axes:
    axis.set_xlabel("step")
    axis.grid(True)
    axis.legend(ncols=2)
  plots.save(figure, path)
