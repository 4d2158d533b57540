"""Holds what ST-MoE (arXiv 2202.08906) reports about the rows of this study.

Nothing here was measured by us.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Claim(NamedTuple):
  """A line of a table of the paper.

  Attributes:
    table: The number of the table, or the section.
    quality: The negative log perplexity, which is minus the nats per target.
    error: The number that the paper prints after ±, or NaN if it prints none.
    stable: The number of stable runs, or None if the paper does not say.
    total: The number of runs, or None if the paper does not say.
  """

  table: str
  quality: float
  error: float = math.nan
  stable: int | None = None
  total: int | None = None


# Tables 2 to 4 are about sparse models with the FLOPs of T5-XL on mC4. All other models were
# trained for 100,000 steps, as those of Table 8, and have the router z-loss, so that the two groups
# do not compare.
CLAIMS = {
  "baseline": Claim("2", -1.755, 0.02, 4, 6),
  "no_geglu": Claim("2", -1.849, 0.02, 3, 3),
  "no_rms_scale": Claim("2", -2.020, 0.06, 3, 3),
  "input_jitter": Claim("3", -1.777, 0.03, 3, 3),
  "dropout": Claim("3", -1.822, 0.11, 3, 3),
  "update_clip": Claim("4", -4.206, 0.17, 3, 3),
  "z_loss_1e-3": Claim("4", -1.741, 0.02, 3, 3),
  "top_2_1.25_2": Claim("8", -1.369),
  "top_1_0.75_0.75": Claim("8", -1.428),
  "top_1_0.75_2": Claim("8", -1.404),
  "top_1_1.25_2": Claim("8", -1.373),
  "top_2_0.75_0.75": Claim("8", -1.424),
  "top_2_0.75_2": Claim("8", -1.402),
  "top_2_2_3": Claim("8", -1.359),
  "top_3_2_3": Claim("8", -1.356),
  "bpr_0.75_0.75": Claim("18", -1.409),
  "bpr_0.75_2": Claim("18", -1.397),
  "threshold_0.05": Claim("21", -1.356),
  "no_extra_ffn": Claim("appendix C", -1.383),
  "additive_bias": Claim("appendix C", -1.371),
  "multiplicative_bias": Claim("appendix C", -1.361),
}
# The quality of the model that the paper changes, for a row whose table starts from another model
# than ours: that of Table 21 has a capacity factor of 3 and a threshold of 0.2.
STARTS = {"threshold_0.05": -1.354}
