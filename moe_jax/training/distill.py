"""A teacher: another model whose predictions a run learns from.

With `hard_weight` 0.75 and `soft_weight` 0.25 this is Switch's distillation of a sparse model into
a dense one (Fedus et al. 2021, arXiv 2101.03961, Sec. 4.2). With `hard_weight` 1 and the model of
before as the teacher, it is the regularisation of the outputs of Lifelong-MoE (Chen et al. 2023,
arXiv 2305.12281), whose weight and direction the paper does not state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.options import NOT_NEGATIVE, POSITIVE, Options, option


@dataclasses.dataclass(frozen=True)
class TeacherOptions(Options):
  """The section `train.teacher`."""

  workdir: str = option(
    "", "The workdir of a run whose model is the teacher, in its newest checkpoint; '' is none."
  )
  soft_weight: Annotated[float, NOT_NEGATIVE] = option(
    0.25, "Weight in the loss of the divergence from the teacher (Switch: 0.25)."
  )
  hard_weight: Annotated[float, NOT_NEGATIVE] = option(
    0.75, "Weight in the loss of the cross-entropy, where there is a teacher (Switch: 0.75)."
  )
  temperature: Annotated[float, POSITIVE] = option(
    1.0, "What the logits of both models are divided by in the divergence."
  )


# JAX arrays are among the fields, and a dataclass of them is compared by nobody.
@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
  """A teacher and how much it says.

  Attributes:
    logits: (variables, rows of a batch) -> logits [B, L, V].
    variables: The variables of the teacher, which do not train.
    options: The section `train.teacher`.
  """

  logits: Callable[[Any, Any], Array]
  variables: Any
  options: TeacherOptions


def divergence(
  student: Float[Array, "B L V"], teacher: Float[Array, "B L V"], temperature: float
) -> Float[Array, "B L"]:
  """Returns KL(teacher || student) at each position in nats, times the squared temperature.

  Its gradient is that of the cross-entropy with the teacher's probabilities, from which it differs
  by the teacher's entropy. The factor keeps the size of the gradient as the temperature grows
  (Hinton et al. 2015, arXiv 1503.02531, Sec. 2). No gradient flows to the teacher.

  Args:
    student: The logits of the model that learns.
    teacher: The logits of the teacher.
    temperature: See `TeacherOptions`.
  """
  wanted = jax.nn.log_softmax(
    jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature, axis=-1
  )
  found = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
  return temperature**2 * jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1)
