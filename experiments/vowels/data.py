"""Peterson and Barney's vowels (1952): formants of four vowels by 75 speakers, in the paper's two
halves.

The table is made by Praat at run time, through the extra `studies`; none of it is kept here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.common import plots

VOWELS = ("iy", "ih", "aa", "ah")  # the paper's [i], [I], [a] and [Λ], as in heed, hid, hod and hud
SYMBOLS = ("[i]", "[I]", "[a]", "[Λ]")
SPEAKERS, TRAINING = 75, 50
DROPPED = 76  # the table's last speaker, a girl: the paper has 75

# What the outputs should be for each vowel. "pairs": one unit, which tells the higher vowel of [i,
# I] from the lower, and [Λ] from [a], so that one line can be an average of the two tasks, as in
# the paper's Fig. 3.
TARGETS = {
  "classes": np.eye(4, dtype=np.float32),
  "pairs": np.array([[1], [0], [0], [1]], np.float32),
}


class Cases(NamedTuple):
  """N cases. formants: [N, 2], F1 and F2 in kHz; vowel: [N], index into `VOWELS`; speaker: [N],
  from 1 on."""

  formants: np.ndarray
  vowel: np.ndarray
  speaker: np.ndarray

  def of(self, speakers) -> Cases:
    """The cases of these speakers."""
    kept = np.isin(self.speaker, speakers)
    return Cases(*(field[kept] for field in self))


def load() -> Cases:
  """Both repetitions of the four vowels by speakers 1 to 75; men are 1 to 33, women 34 to 61,
  children 62 to 75.

  Raises:
    ConfigError: the extra is not installed.
  """
  call = plots.need("parselmouth.praat").call
  table = call("Create formant table (Peterson & Barney 1952)")
  rows = range(1, int(call(table, "Get number of rows")) + 1)

  def column(name):
    return np.array([call(table, "Get value", row, name) for row in rows])

  vowel, speaker = column("Vowel"), column("Speaker").astype(int)
  kept = np.isin(vowel, VOWELS) & (speaker != DROPPED)
  formants = np.stack([column(name).astype(np.float32) / 1000 for name in ("F1", "F2")], axis=1)
  return Cases(formants[kept], np.array([VOWELS.index(v) for v in vowel[kept]]), speaker[kept])


def split(cases: Cases, order: str) -> tuple[Cases, Cases]:
  """The first 50 speakers and the last 25.

  Args:
    cases: of all 75.
    order: "file": 33 men and 17 women, then 11 women and 14 children; "random": shuffled by NumPy's
      generator, seed 0.
  """
  speakers = np.arange(1, SPEAKERS + 1)
  if order == "random":
    speakers = np.random.default_rng(0).permutation(speakers)
  return cases.of(speakers[:TRAINING]), cases.of(speakers[TRAINING:])
