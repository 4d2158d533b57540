"""The options of training: the section `train` without its sections guard and teacher."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from moe_jax.options import NOT_NEGATIVE, OPTIONAL_STEPS, ROWS, STEPS, Bounds, Options, option

_COPIES = Bounds(1, 1_000, "each is a copy of the state on disk")


@dataclasses.dataclass(frozen=True)
class TrainOptions(Options):
  """How long a run trains, on how much at once, and what it writes and keeps."""

  steps: Annotated[int, STEPS] = option(1000, "Updates of the whole run.")
  batch_size: Annotated[int, ROWS] = option(32, "Sequences a step, over all processes.")
  accumulate_steps: Annotated[int, ROWS] = option(
    1,
    "Microbatches a step; divides batch_size. They make the same update as the whole batch where "
    "groups of tokens lie within rows.",
  )
  log_every: Annotated[int, STEPS] = option(10, "Steps between lines of metrics.")
  eval_every: Annotated[int, STEPS] = option(200, "Steps between evaluations.")
  eval_batches: Annotated[int, OPTIONAL_STEPS] = option(
    16, "Batches an evaluation reads of each source; 0 is its whole validation split."
  )
  checkpoint_every: Annotated[int, STEPS] = option(200, "Steps between checkpoints.")
  output_z_loss: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Weight of log^2 Z of the output softmax in the loss."
  )
  keep_last: Annotated[int, _COPIES] = option(1, "Newest checkpoints that are kept.")
  keep_best: Annotated[int, dataclasses.replace(_COPIES, low=0)] = option(
    1, "Checkpoints of the lowest validation score that are kept besides."
  )
  max_minutes: Annotated[float, Bounds(0, 10**7, "20 years")] = option(
    0.0,
    "Minutes of wall-clock time after which this start saves and ends with exit code 0; 0 = no "
    "limit.",
  )
  final_eval_batches: Annotated[int, OPTIONAL_STEPS] = option(
    0, "Batches of each source that the last evaluation reads; 0 is the whole validation split."
  )

  @property
  def microbatch(self) -> int:
    """The sequences of a microbatch, over all processes."""
    return self.batch_size // self.accumulate_steps
