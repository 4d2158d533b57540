"""Scaling of the rotary embedding, by which a model reads longer rows than it was first trained on.

All of it changes the frequencies theta_i = theta^(-2i/P) of the P/2 rotated pairs before anything
is traced:

    linear  theta_i / s (Chen et al. 2023, arXiv 2306.15595)
    yarn    (1 - g_i) theta_i / s + g_i theta_i, where g_i falls linearly in i from 1 to 0 between
            the pairs that turn beta_fast and beta_slow times in original_length tokens (Peng et al.
            2023, arXiv 2309.00071, Eq. 13 to 15)
    llama3  the same with g_i that falls linearly in the number of turns, from 1 at high_freq_factor
            turns to 0 at low_freq_factor turns (LLaMA 3.1's released code)

YaRN also multiplies the rotated features by an attention factor, which is 0.1 ln(s) + 1 unless it
is given, and DeepSeek multiplies the scores by (0.1 m ln(s) + 1)^2 with m = score_mscale.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float

from moe_jax.options import LARGEST, NOT_NEGATIVE, POSITIVE, ROWS, Bounds, Options, option

_FACTOR = Bounds(1, LARGEST, "below 1, rows would become shorter")


@dataclasses.dataclass(frozen=True)
class RopeOptions(Options):
  """The section `model.rope`: how the rotary embedding is scaled."""

  scaling: Literal["none", "linear", "llama3", "yarn"] = option(
    "none", "How the frequencies are changed for longer rows."
  )
  factor: Annotated[float, _FACTOR] = option(1.0, "By how much rows become longer, s.")
  original_length: Annotated[int, ROWS] = option(
    4096, "Tokens of a row before the change (llama3 and yarn)."
  )
  low_freq_factor: Annotated[float, POSITIVE] = option(
    1.0, "Turns in original_length tokens below which a frequency is divided by s (llama3)."
  )
  high_freq_factor: Annotated[float, POSITIVE] = option(
    4.0, "Turns above which a frequency stays (llama3)."
  )
  beta_fast: Annotated[float, POSITIVE] = option(32.0, "Turns above which it stays (yarn).")
  beta_slow: Annotated[float, POSITIVE] = option(1.0, "Turns below which it is divided (yarn).")
  attention_factor: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Factor on rotated queries and keys (yarn); 0 means 0.1 ln(s) + 1."
  )
  score_mscale: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "The m of the factor on scores of latent attention (yarn, DeepSeek); 0 means no factor."
  )

  @property
  def amplitude(self) -> float:
    """The factor on rotated queries and keys."""
    if self.scaling != "yarn":
      return 1.0
    return self.attention_factor or mscale(self.factor)

  @property
  def score_factor(self) -> float:
    """The factor on the scores of latent attention."""
    if self.scaling != "yarn" or not self.score_mscale:
      return 1.0
    return mscale(self.factor, self.score_mscale) ** 2


def mscale(factor: float, m: float = 1.0) -> float:
  """Returns YaRN's 0.1 m ln(s) + 1 for a factor s, which is at least 1."""
  return 0.1 * m * math.log(factor) + 1.0


def kept_share(half: int, theta: float, options: RopeOptions) -> Float[np.ndarray, "half"]:
  """Returns how much of each frequency is kept, g; the rest is divided by the factor.

  Args:
    half: Number of rotated pairs, P/2.
    theta: Base of the frequencies.
    options: The options.
  """
  if options.scaling == "none":
    return np.ones(half)
  if options.scaling == "linear":
    return np.zeros(half)
  pairs = np.arange(half)
  if options.scaling == "llama3":
    turns = options.original_length / (2 * math.pi * theta ** (pairs / half))
    low, high = options.low_freq_factor, options.high_freq_factor
    return np.clip((turns - low) / (high - low), 0, 1)

  def pair_of(turns: float) -> float:
    """Returns the pair, not rounded, that turns so often."""
    return half * math.log(options.original_length / (turns * 2 * math.pi)) / math.log(theta)

  first = max(math.floor(pair_of(options.beta_fast)), 0)
  last = min(math.ceil(pair_of(options.beta_slow)), 2 * half - 1)
  # Without this, equal ends would divide by 0. The released code adds as much.
  width = last - first or 0.001
  return 1 - np.clip((pairs - first) / width, 0, 1)
