"""Lists what the papers measured of their own runs, for comparison with a dry run's estimates.

These are not measurements of this project.
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple


class Measured(NamedTuple):
  """What a paper reports about the time of a step.

  Attributes:
    seconds: The time of a step with as many tokens as the config's. It is 0 if the paper does not
      give it.
    machine: The machine on which the paper ran it.
    source: The paper and the place in it.
  """

  seconds: float
  machine: str
  source: str


_GSHARD = "arXiv 2006.16668, Tables 1 and 3"
_BRAIN = "arXiv 2306.00008, Table 3: {} steps a second; neither batch nor machine stands beside it"
# Config file and variant -> the figure.
TABLE = {
  "gshard:600b": Measured(1 / 0.72, "2048 TPU v3 cores", _GSHARD + "; 22.4 core-years, 4.0 days"),
  "gshard:200b": Measured(1 / 2.15, "2048 TPU v3 cores", _GSHARD + "; 7.5 core-years, 1.4 days"),
  "gshard:150b": Measured(1 / 1.05, "512 TPU v3 cores", _GSHARD + "; 15.5 core-years, 11.0 days"),
  "gshard:50b": Measured(1 / 3.28, "512 TPU v3 cores", _GSHARD + "; 4.9 core-years, 3.5 days"),
  "gshard:37b": Measured(1 / 0.67, "128 TPU v3 cores", _GSHARD + "; 6.1 core-years, 17.3 days"),
  "gshard:12_5b": Measured(1 / 2.16, "128 TPU v3 cores", _GSHARD + "; 1.9 core-years, 5.4 days"),
  "glam:64b_64e": Measured(
    574 * 3600 * 2**20 / 280e9,
    "1,024 TPU v4 chips",
    "arXiv 2112.06905: 280B tokens in 574 hours, in batches of 1M tokens",
  ),
  "glam:0_1b_32e": Measured(1 / 1.92, "machine not stated", _BRAIN.format(1.92)),
  "glam:1_7b_64e": Measured(1 / 1.23, "machine not stated", _BRAIN.format(1.23)),
  "glam:8b_64e": Measured(1 / 0.39, "machine not stated", _BRAIN.format(0.39)),
  "expert_choice:8b_64e": Measured(1 / 0.50, "machine not stated", _BRAIN.format(0.50)),
  "brainformer:100m_32e": Measured(
    1 / 1.92, "machine not stated", _BRAIN.format(1.92) + "; Brainformer-1: 2.03"
  ),
  "brainformer:1b_64e": Measured(
    1 / 1.23, "machine not stated", _BRAIN.format(1.23) + "; Brainformer-1: 2.00"
  ),
  "brainformer:8b_64e": Measured(
    1 / 0.39, "machine not stated", _BRAIN.format(0.39) + "; Brainformer-1: 1.96"
  ),
  "switch:base_128e": Measured(
    0.0,
    "32 TPU v3 cores",
    "arXiv 2101.03961, Table 1: 910 examples a second at capacity factor 1.25",
  ),
  "st_moe:32b": Measured(
    4.244, "machine not stated", "arXiv 2202.08906, Table 9, capacity factor 1.25"
  ),
  "st_moe:l": Measured(
    2.397, "machine not stated", "arXiv 2202.08906, Table 9, capacity factor 1.25"
  ),
}


def find(path: str) -> Measured | None:
  """Returns the paper's figure for a config, or None if there is none.

  Args:
    path: The config, as configs/FAMILY.py:VARIANT.
  """
  name, _, variant = path.partition(":")
  return TABLE.get(f"{pathlib.PurePath(name).stem}:{variant}")
