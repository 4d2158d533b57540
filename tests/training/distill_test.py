import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.training.distill import Teacher, TeacherOptions, divergence

pytestmark = pytest.mark.numerics


def test_divergence_by_hand():
  # Catches the other direction, a missing factor of the temperature, and a mean in place of a sum.
  student, teacher = jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.8, 0.2]]]))
  expected = 0.8 * np.log(0.8 / 0.5) + 0.2 * np.log(0.2 / 0.5)
  np.testing.assert_allclose(divergence(student, teacher, 1.0), [[expected]], rtol=1e-6)
  # At temperature 2 the teacher has probabilities in the ratio 2 : 1.
  hot = 4 * (2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3))
  np.testing.assert_allclose(divergence(student, teacher, 2.0), [[hot]], rtol=1e-6)
  np.testing.assert_allclose(divergence(teacher, teacher, 1.0), [[0.0]], atol=1e-7)


def test_the_gradient_is_that_of_soft_targets_and_spares_the_teacher():
  # Catches a teacher that learns from its student.
  keys = jax.random.split(jax.random.key(0), 2)
  student, teacher = (jax.random.normal(key, (1, 2, 5)) for key in keys)

  def soft(student):
    return -jnp.sum(jax.nn.softmax(teacher) * jax.nn.log_softmax(student))

  by_student, by_teacher = jax.grad(lambda s, t: divergence(s, t, 1.0).sum(), argnums=(0, 1))(
    student, teacher
  )
  np.testing.assert_allclose(by_student, jax.grad(soft)(student), rtol=1e-5, atol=1e-6)
  assert not by_teacher.any()


@pytest.mark.parametrize("steps", tiny.often({2}, [1, 2]))
def test_the_loss_of_a_step_with_a_teacher(tmp_path, steps):
  # Catches weights that are exchanged, padding that is learnt, and microbatches that are each
  # divided by their own number of tokens.
  state, step, batch = one_step(tmp_path)
  wanted = jax.random.normal(jax.random.key(7), (4, 32, 264))
  teacher = Teacher(
    lambda variables, rows: variables["logits"][rows["row"]],
    {"logits": wanted},
    TeacherOptions(workdir="x", soft_weight=0.4, hard_weight=0.3, temperature=2.0),
  )
  batch = batch | {"row": jnp.arange(4)}
  _, alone = jax.jit(functools.partial(step, accumulate_steps=steps))(state, batch)
  _, taught = jax.jit(
    lambda state, batch: step(state, batch, teacher=teacher, accumulate_steps=steps)
  )(state, batch)
  auxiliary = alone["loss"] - alone["cross_entropy"]
  np.testing.assert_allclose(taught["cross_entropy"], alone["cross_entropy"], rtol=1e-5)
  assert float(taught["teacher_divergence"]) > 0.1
  np.testing.assert_allclose(
    taught["loss"],
    0.3 * taught["cross_entropy"] + 0.4 * taught["teacher_divergence"] + auxiliary,
    rtol=1e-5,
  )


def one_step(tmp_path):
  """Returns a state, a step function and a batch with padding."""
  from moe_jax import assembly, sharding
  from moe_jax.training import optimizers
  from moe_jax.training import state as states
  from moe_jax.training.step import train_step

  config = tiny.config(tmp_path)
  model = assembly.model(config, 264, sharding.make_mesh({"data": 1}))
  optimizer, schedule = optimizers.make(optimizers.OptimizerOptions.of(config.optimizer), 6)
  tokens = jax.random.randint(jax.random.key(1), (4, 33), 0, 264)
  positions = jnp.broadcast_to(jnp.arange(32), (4, 32))
  segments = (positions < jnp.array([[32], [20], [32], [5]])).astype(jnp.int32)
  batch = {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segment_ids": segments,
    "positions": positions,
  }
  drawn = tiny.weights(model, batch["inputs"], segments, positions)
  state = states.first_state(drawn, optimizer, jax.random.key(0))
  step = functools.partial(
    train_step,
    model=model,
    optimizer=optimizer,
    schedule=schedule,
    loss_weights=assembly.loss_weights(config),
  )
  return state, step, batch
