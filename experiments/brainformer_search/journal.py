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
  """results.jsonl: a head, GLaM's block, the trials, the finals, one line each; all that a resumed
  search knows."""

  path: pathlib.Path

  def __post_init__(self):
    self.lines = journal.load(self.path)

  def add(self, row: str, line: dict[str, Any]) -> None:
    self.lines[row] = {"row": row} | line
    journal.append(self.path, self.lines[row])

  def head(self, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes the first line, or holds it against these settings.

    Raises:
      ConfigError: the search in this file has others.
    """
    if "search" not in self.lines:
      return self.add("search", {"settings": settings} | facts)
    for name, value in settings.items():
      before = self.lines["search"]["settings"].get(name)
      if before != json.loads(json.dumps(value)):
        raise ConfigError(
          name,
          value,
          f"the search in {self.path} has {before!r}; give the same, or another --results",
        )
    return None

  @property
  def trials(self) -> list[dict[str, Any]]:
    """Trials 0, 1, ..., up to the first that is missing."""
    found = []
    while (name := f"trial_{len(found):03}") in self.lines:
      found.append(self.lines[name])
    return found

  @property
  def done(self) -> list[tuple[search.Block, float]]:
    return [(tuple(line["block"]), line["reward"]) for line in self.trials]

  @property
  def spent(self) -> float:
    """CPU seconds of all processes, compiling and evaluating included."""
    return sum(line.get("cpu_seconds", 0.0) for line in self.lines.values())
