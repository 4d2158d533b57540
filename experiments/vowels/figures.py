"""Draws decision lines under the three errors, learning curves, and the search for step sizes."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import plots
from experiments.common.plots import COLOURS
from experiments.vowels import study
from experiments.vowels.data import SYMBOLS, Cases

MARKERS = ("o", "^", "s", "D")
MEANT = {
  "cooperative": "cooperative (1.1)",
  "expected": "expected (1.2)",
  "competitive": "competitive (1.3)",
}


def lines(cases: Cases, trained: dict[str, study.Trained], path: pathlib.Path) -> None:
  """Draws the decision line of each expert in use, and where the gate hands over.

  The networks are those at the end of the run of seed 0, over F1 and F2.

  Args:
    cases: The training cases.
    trained: Error -> trained network with one output ("pairs").
    path: The PNG to write.
  """
  plt = plots.pyplot()
  figure, axes = plt.subplots(1, len(trained), figsize=(4.4 * len(trained), 4.9), sharey=True)
  grid = np.stack(np.meshgrid(np.linspace(0.15, 1.25, 221), np.linspace(0.6, 3.4, 281)), axis=-1)
  for axis, (error, (_, network, runs)) in zip(axes, trained.items(), strict=True):
    weights = jax.tree.map(lambda leaf: leaf[0], runs.params)
    for index, symbol in enumerate(SYMBOLS):
      axis.scatter(
        *cases.formants[cases.vowel == index].T,
        s=11,
        c="none",
        edgecolors="#666" if index in (0, 3) else "#aaa",
        marker=MARKERS[index],
        linewidths=0.8,
        label=symbol,
      )
    used = study.in_use(
      np.asarray(network.apply({"params": weights}, jnp.asarray(cases.formants))[0])
    )
    gate, answers = (
      np.asarray(a) for a in network.apply({"params": weights}, jnp.asarray(grid.reshape(-1, 2)))
    )
    for expert in used:
      axis.contour(
        grid[..., 0],
        grid[..., 1],
        answers[:, expert, 0].reshape(grid.shape[:2]),
        levels=[0.5],
        colors=COLOURS[expert % 4],
        linewidths=2,
      )
      axis.plot(
        [], [], color=COLOURS[expert % 4], linewidth=2, label=f"expert {expert}: output 0.5"
      )
    if len(used) > 1:
      leader = used[gate[:, used].argmax(-1)].reshape(grid.shape[:2])
      for expert in used[:-1]:
        axis.contour(
          grid[..., 0],
          grid[..., 1],
          leader == expert,
          levels=[0.5],
          colors="black",
          linewidths=1.2,
          linestyles="dashed",
        )
      axis.plot([], [], color="black", linewidth=1.2, linestyle="dashed", label="gate hands over")
    axis.set(title=MEANT[error], xlabel="F1, kHz", xlim=(0.15, 1.25), ylim=(0.6, 3.4))
    axis.legend(loc="upper right")
  axes[0].set_ylabel("F2, kHz")
  plots.save(figure, path)


def curves(trained: dict[str, dict[str, study.Trained]], path: pathlib.Path) -> None:
  """Draws for each condition the squared error by epoch, and the search for step sizes.

  The left panel shows the median and the quartiles over seeds. The right panel shows the mean
  epochs to the criterion by step size, where all seeds of the search arrive.

  Args:
    trained: Condition -> model -> trained networks.
    path: The PNG to write.
  """
  plt = plots.pyplot()
  figure, axes = plt.subplots(len(trained), 2, figsize=(11, 3.9 * len(trained)), squeeze=False)
  for (left, right), (condition, models) in zip(axes, trained.items(), strict=True):
    for colour, (name, (row, _, runs)) in zip(COLOURS, models.items(), strict=False):
      curve, last = runs.curve, max(row["epochs"]) + 1
      low, middle, high = np.nanquantile(curve[:last], (0.25, 0.5, 0.75), axis=1)
      left.plot(middle, color=colour, label=name, linewidth=1.2)
      left.fill_between(np.arange(last), low, high, color=colour, alpha=0.15, linewidth=0)
      tried = [np.nan if n is None else n for n in row["search"]]
      right.plot(study.STEP_SIZES, tried, color=colour, marker="o", markersize=4, label=name)
    left.axhline(
      study.CRITERION, color="black", linewidth=0.8, linestyle="dashed", label="criterion"
    )
    left.set(
      xlabel="epoch",
      ylabel="mean squared error",
      ylim=(0.07, 0.27),
      title=f"{condition}: median, quartiles",
    )
    right.set(
      xlabel="step size",
      ylabel="mean epochs to the criterion",
      ylim=(0, 3100),
      title=f"{condition}: where all of {study.SEARCHED} seeds arrive",
    )
    right.set_xscale("log", base=2)
    right.set_xticks(study.STEP_SIZES[::2], [f"{size:g}" for size in study.STEP_SIZES[::2]])
    for axis in (left, right):
      axis.grid(True)
      axis.legend()
  plots.save(figure, path)
