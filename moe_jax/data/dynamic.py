"""Shares of the sources that follow their losses: the dynamic batch loading of Sheared LLaMA.

Sheared LLaMA (Xia et al., 2023, arXiv 2310.06694, Algorithm 1) evaluates every m steps the loss l_i
of each source i on its validation text, and then changes the shares w_i:

    delta_i = max(l_i - reference_i, 0),    w_i <- w_i exp(delta_i) / sum_j w_j exp(delta_j)

So a source gets more of the next batches if the model is further from the loss that it should reach
there. The paper takes the references from a scaling law that was fitted to larger models, or from
the model that was pruned. This is the first published variant, and the default.

The second one is that of the code that was released with the paper, and of the code of LLaMA-MoE
(arXiv 2406.16554): delta_i may be negative, so that the share of a source whose loss is below its
reference shrinks, and the result is mixed with even shares, w_i <- (1 - c) w_i + c / n, where
c = 1e-4 for n sources.

The batches that follow a change of the shares contain them exactly, as `mixture.mix` says, and each
source goes on with the record at which it stood.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.options import NOT_NEGATIVE, OPTIONAL_STEPS, PROBABILITY, SMALLEST, Options, option


@dataclasses.dataclass(frozen=True)
class DynamicOptions(Options):
  """The section `data.dynamic`: when and how the shares of the sources follow their losses."""

  every: Annotated[int, OPTIONAL_STEPS] = option(
    0,
    "Steps between changes of the shares by Sheared LLaMA's rule, a multiple of train.eval_every, "
    "whose losses they use; 0 = the shares stay those of data.weights.",
  )
  references: Annotated[tuple[float, ...], NOT_NEGATIVE] = option(
    (), "The loss that should be reached on each of data.sources, in nats per target."
  )
  positive: bool = option(
    True,
    "Whether a loss below its reference counts as equal to it, as in the paper; False is the "
    "released code.",
  )
  smoothing: Annotated[float, PROBABILITY] = option(
    0.0, "Part of the shares that is divided evenly; 0 is the paper, and 1e-4 the released code."
  )


def check(
  options: DynamicOptions,
  sources: Sequence[str],
  weights: Sequence[float],
  pipeline: str,
  eval_every: int,
) -> None:
  """Checks that the shares of the sources can follow their losses, if they are to do so.

  Args:
    options: The section `data.dynamic`.
    sources: The names of the sources.
    weights: The option `data.weights`.
    pipeline: The option `data.pipeline`.
    eval_every: The number of steps between evaluations.

  Raises:
    ConfigError: If there are fewer than two sources, if one of them has no share, if the number of
      references is not that of the sources, if no evaluation belongs to each change, or if the
      pipeline is not "windows".
  """
  if not options.every:
    return
  if len(sources) < 2:
    raise ConfigError(
      "data.dynamic.every",
      options.every,
      f"changes the shares of several sources, and data.sources has {len(sources)}; must be 0",
    )
  if 0 in weights:
    raise ConfigError(
      "data.weights",
      tuple(weights),
      "has a source without a share, and data.dynamic.every multiplies shares; give it a small one",
    )
  if len(options.references) != len(sources):
    raise ConfigError(
      "data.dynamic.references",
      options.references,
      f"needs one loss for each of the {len(sources)} data.sources ({', '.join(sources)})",
    )
  if options.every % eval_every:
    raise ConfigError(
      "data.dynamic.every",
      options.every,
      f"must be a multiple of train.eval_every={eval_every}, because it uses the losses of "
      f"evaluations, e.g. {-(-options.every // eval_every) * eval_every}",
    )
  if pipeline != "windows":
    raise ConfigError(
      "data.pipeline",
      pipeline,
      "has no dynamic shares, because its rows stand in the middle of documents; set "
      "--config.data.pipeline=windows, or data.dynamic.every=0",
    )


def next_weights(
  weights: Sequence[float],
  losses: Sequence[float],
  references: Sequence[float],
  positive: bool = True,
  smoothing: float = 0.0,
) -> list[float]:
  """Returns the shares after one application of the rule.

  Args:
    weights: The shares of the n sources until now, each above 0.
    losses: The validation loss of each source, in nats per target.
    references: The loss that each source should reach, in nats per target.
    positive: Whether a loss below its reference counts as equal to it.
    smoothing: The part c of the shares that is divided evenly.

  Returns:
    The n shares, whose sum is 1. None is below 1e-30, so that each source can come back.

  Raises:
    ValueError: If the three sequences have different lengths, or a number is not finite.
  """
  old, loss, reference = (np.array(x, np.float64) for x in (weights, losses, references))
  if (
    not old.shape == loss.shape == reference.shape or not np.isfinite([old, loss, reference]).all()
  ):
    raise ValueError(f"no shares follow from {weights}, {losses} and {references}")
  excess = loss - reference
  if positive:
    excess = np.maximum(excess, 0)
  # A common factor of all exponentials does not change the shares. With this one none overflows.
  new = old * np.exp(excess - excess.max())
  # `fsum` rounds once, so that the sum does not depend on how NumPy groups its terms.
  new = np.maximum(new / math.fsum(new), SMALLEST)
  new = (1 - smoothing) * new + smoothing / len(new)
  return (new / math.fsum(new)).tolist()
