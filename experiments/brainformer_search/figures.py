"""Draws the rewards over trials, and the best block beside GLaM's."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from experiments.brainformer_search import search
from experiments.common import plots
from moe_jax.assembly.sublayers import kind, options

COLOURS = {"attention": "#cc79a7", "ffn": "#0072b2", "moe": "#d55e00"}  # Okabe and Ito


def write(journal: Any, directory: pathlib.Path) -> None:
  """Writes rewards.png and blocks.png into a folder."""
  plt = plots.pyplot()
  rewards(plt, journal, directory / "rewards.png")
  blocks(plt, journal, directory / "blocks.png")


def rewards(plt: Any, journal: Any, path: pathlib.Path) -> None:
  """Draws each trial's reward, and the best reward so far among the trials that are fast enough.

  Trials that were stopped stand at the foot of the figure.
  """
  trials, lost = journal.trials, search.LOST
  scores = np.array([line["reward"] for line in trials])
  steps = np.array([line["relative_step"] for line in trials])
  kept = scores > lost
  floor = min(scores[kept].min(initial=0.0), 0.0) - 0.1
  figure, axis = plt.subplots(figsize=(8, 4.2))
  number = np.arange(len(trials))
  for mask, colour, words in (
    (kept & (steps <= 1), "#0072b2", "steps as fast as GLaM's"),
    (kept & (steps > 1), "#999999", "slower steps"),
  ):
    axis.scatter(number[mask], scores[mask], s=22, color=colour, label=words)
  axis.scatter(
    number[~kept],
    np.full(np.sum(~kept), floor),
    s=22,
    marker="x",
    color="#d55e00",
    label="stopped at a quarter: reward -1",
  )
  running = np.maximum.accumulate(np.where(kept & (steps <= 1), scores, -np.inf))
  axis.step(
    number[np.isfinite(running)],
    running[np.isfinite(running)],
    where="post",
    color="#0072b2",
    linewidth=1.2,
    label="best so far",
  )
  axis.axhline(0, color="black", linewidth=0.8, linestyle="dashed", label="GLaM's block")
  axis.axvline(
    journal.lines["search"]["settings"]["population"] - 0.5, color="#bbbbbb", linewidth=0.8
  )
  axis.set(
    xlabel="trial (to the left of the line: drawn at random)",
    ylabel="reward: bits per byte below GLaM's",
    xlim=(-1, len(trials)),
  )
  axis.grid(True)
  axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
  plots.save(figure, path)


def blocks(plt: Any, journal: Any, path: pathlib.Path) -> None:
  """Draws the sublayers of both blocks from left to right.

  A bar is as high as the number of the sublayer's weights that a token meets.
  """
  pairs = [
    (name, journal.lines[f"final_{row}_1"]["block"])
    for name, row in (("best found", "best"), ("GLaM's", "glam"))
  ]
  figure, axes = plt.subplots(len(pairs), 1, figsize=(9, 6.4), sharey=True)
  for axis, (name, block) in zip(axes, pairs, strict=True):
    for place, entry in enumerate(block):
      axis.bar(place, met(entry) / 1e3, color=COLOURS[kind(entry)], width=0.8)
      axis.text(
        place,
        met(entry) / 1e3,
        "\n".join([kind(entry), *map(str, options(entry).values())]),
        ha="center",
        va="bottom",
        fontsize=8,
      )
    axis.set(
      title=name,
      xticks=range(len(block)),
      xticklabels=range(1, len(block) + 1),
      ylabel="thousand weights",
    )
    axis.margins(y=0.75)
    axis.spines[["top", "right"]].set_visible(False)
  axes[-1].set_xlabel(
    "sublayer; above each: kind, width, heads, or hidden width, activation, gate and capacity"
  )
  plots.save(figure, path)


def met(entry: str) -> int:
  """Returns the number of a sublayer's weights that a token meets; of experts it meets two."""
  chosen = options(entry)
  if kind(entry) == "attention":
    return 4 * chosen["width"] * chosen["heads"] * search.HEAD_DIM
  matrices = 3 if chosen["activation"] in ("reglu", "geglu") else 2
  return matrices * chosen["width"] * chosen["hidden"] * (2 if kind(entry) == "moe" else 1)
