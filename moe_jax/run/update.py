"""The training step of a config as one jitted function, for the training loop and for dry runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import linen as nn

from moe_jax import assembly
from moe_jax.training.distill import Teacher
from moe_jax.training.step import train_step


def make(
  config: Any,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  schedule: Callable,
  teacher: Teacher | None = None,
) -> Callable:
  """Returns the jitted `update(state, batch) -> (state, metrics)` of a config.

  It is `train_step` with the options of the config. The state is donated.

  Args:
    config: A config that `assembly.validate` accepts.
    model: The model of `assembly.model`.
    optimizer: The optimizer of `optimizers.make`.
    schedule: The schedule of `optimizers.make`, which maps a step to the learning rate.
    teacher: The model to learn from; None means that there is none.
  """
  step = functools.partial(
    train_step,
    model=model,
    optimizer=optimizer,
    schedule=schedule,
    loss_weights=assembly.loss_weights(config),
    accumulate_steps=config.train.accumulate_steps,
    output_z_loss=config.train.output_z_loss,
    balance=assembly.balance(config),
    skip_nonfinite=config.train.guard.skip_nonfinite,
  )
  if teacher is None:
    return jax.jit(step, donate_argnums=0)

  def taught(state, batch, variables):
    return step(state, batch, teacher=dataclasses.replace(teacher, variables=variables))

  # The teacher's weights are an argument, because constants would be copied into the program.
  compiled = jax.jit(taught, donate_argnums=0)
  return lambda state, batch: compiled(state, batch, teacher.variables)
