"""The journal of a search: results.jsonl, which is all that a resumed search knows."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from experiments.brainformer_search import search
from experiments.common import journal
from moe_jax.errors import ConfigError


@dataclasses.dataclass
class Journal:
  """The journal of a search: one line for the settings, GLaM's block, each trial and each final.

  Attributes:
    path: The file.
    lines: Row -> its line.
  """

  path: pathlib.Path

  def __post_init__(self):
    self.lines = journal.load(self.path)

  def add(self, row: str, line: dict[str, Any]) -> None:
    """Adds a line to the journal and to its file."""
    self.lines[row] = {"row": row} | line
    journal.append(self.path, self.lines[row])

  def head(self, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes the settings as the first line, or compares them with those that are there.

    Args:
      settings: The settings, which decide what is proposed and how it is trained.
      facts: What else the line records, such as versions.

    Raises:
      ConfigError: The search in this file has other settings.
    """
    if "search" not in self.lines:
      return self.add("search", {"settings": settings} | facts)
    for name, value in settings.items():
      before = self.lines["search"]["settings"].get(name)
      if before != json.loads(json.dumps(value)):
        raise ConfigError(
          name,
          value,
          f"the search in {self.path} has {before!r}; give the same value, or another --results",
        )
    return None

  @property
  def trials(self) -> list[dict[str, Any]]:
    """The trials 0, 1, ... up to the first that is missing."""
    trials = []
    while (name := f"trial_{len(trials):03}") in self.lines:
      trials.append(self.lines[name])
    return trials

  @property
  def done(self) -> list[tuple[search.Block, float]]:
    """The block and the reward of each trial."""
    return [(tuple(line["block"]), line["reward"]) for line in self.trials]

  @property
  def spent(self) -> float:
    """The CPU seconds of all processes, including compiling and evaluating."""
    return sum(line.get("cpu_seconds", 0.0) for line in self.lines.values())
