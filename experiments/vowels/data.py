"""Loads Peterson and Barney's vowels (1952): formants of four vowels by 75 speakers.

Praat makes the table at run time, through the extra [studies]; none of it is kept here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.common import plots

# The paper's [i], [I], [a] and [Λ], as in heed, hid, hod and hud.
VOWELS = ("iy", "ih", "aa", "ah")
SYMBOLS = ("[i]", "[I]", "[a]", "[Λ]")
SPEAKERS, TRAINING = 75, 50
DROPPED = 76  # the last speaker of the table, a girl; the paper has 75 speakers

# The targets of the outputs for each vowel. "pairs" has one unit, which tells the higher vowel of
# [i, I] from the lower one, and [Λ] from [a]. One line can then be an average of the two tasks, as
# in the paper's Fig. 3.
TARGETS = {
  "classes": np.eye(4, dtype=np.float32),
  "pairs": np.array([[1], [0], [0], [1]], np.float32),
}


class Cases(NamedTuple):
  """N spoken vowels.

  Attributes:
    formants: [N, 2], F1 and F2 in kHz.
    vowel: [N], indices into `VOWELS`.
    speaker: [N], the speakers' numbers from 1 on.
  """

  formants: np.ndarray
  vowel: np.ndarray
  speaker: np.ndarray

  def of(self, speakers) -> Cases:
    """Returns the cases of these speakers."""
    kept = np.isin(self.speaker, speakers)
    return Cases(*(field[kept] for field in self))


def load() -> Cases:
  """Returns both repetitions of the four vowels by speakers 1 to 75.

  Men are 1 to 33, women 34 to 61, and children 62 to 75.

  Raises:
    ConfigError: The extra [studies] is not installed.
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
  """Returns the cases of the first 50 speakers for training, and those of the last 25 for testing.

  Args:
    cases: The cases of all 75 speakers.
    order: The order of the speakers. "file" trains on 33 men and 17 women and tests on 11 women and
      14 children. "random" shuffles the speakers by NumPy's generator with seed 0.
  """
  speakers = np.arange(1, SPEAKERS + 1)
  if order == "random":
    speakers = np.random.default_rng(0).permutation(speakers)
  return cases.of(speakers[:TRAINING]), cases.of(speakers[TRAINING:])
