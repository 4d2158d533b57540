"""The training step of a config as one jitted function: what the loop runs, and what a dry run
compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import linen as nn

from moe_jax import assembly
from moe_jax.training.step import train_step


def make(
  config: Any, model: nn.Module, optimizer: optax.GradientTransformation, schedule: Callable
) -> Callable:
  """`update(state, batch) -> (state, metrics)`: `train_step` of this config; the state is donated.

  Args:
    config: as of configs/base.py, checked.
    model: of `assembly.model`.
    optimizer: of `optimizers.make`, as the next.
    schedule: step -> learning rate.
  """
  return jax.jit(
    functools.partial(
      train_step,
      model=model,
      optimizer=optimizer,
      schedule=schedule,
      loss_weights=assembly.loss_weights(config),
      accumulate_steps=config.train.accumulate_steps,
      output_z_loss=config.train.output_z_loss,
      bias_update_rate=assembly.bias_update_rate(config),
      skip_nonfinite=config.train.guard.skip_nonfinite,
    ),
    donate_argnums=0,
  )
