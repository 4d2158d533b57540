"""One update and one evaluation as pure functions, which can be jitted and vmapped over seeds.

They do no I/O, read no clock and use no global variable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Int, PyTree

from moe_jax import layers
from moe_jax.models.output import token_nats
from moe_jax.routing import metrics as router_metrics
from moe_jax.training.accumulate import Batch, accumulate
from moe_jax.training.distill import Teacher, divergence
from moe_jax.training.state import TrainState


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  schedule: Callable,
  loss_weights: dict[str, float],
  accumulate_steps: int = 1,
  output_z_loss: float = 0.0,
  balance: Callable[[PyTree, dict[str, Array]], PyTree] | None = None,
  skip_nonfinite: bool = False,
  teacher: Teacher | None = None,
) -> tuple[TrainState, dict[str, Array]]:
  """Does one update.

  The loss is the cross-entropy, plus the weighted z-loss of the output softmax, plus the weighted
  auxiliary losses. With a teacher, the cross-entropy has a weight, and so has the divergence from
  the teacher, which is added. The cross-entropy (nats) is the mean over the batch's real targets.
  Losses, metrics and the update are those of the whole batch, even if it is cut into microbatches.
  See `accumulate` for what that costs, and for the exceptions.

  Args:
    state: The current state. The caller should donate it.
    batch: The batch; see `Batch`.
    model: The model, called as in `apply`.
    optimizer: The optimizer of `optimizers.make`.
    schedule: The schedule of `optimizers.make`, which is only reported.
    loss_weights: The weight of each of `Aux.losses`.
    accumulate_steps: The number of microbatches, which must divide B.
    output_z_loss: The weight of the mean of log^2 Z of the output softmax.
    balance: (router state, sums of the batch) -> the next router state (`routing/balancing.py`).
      None leaves it alone.
    skip_nonfinite: Whether an update is skipped if the loss or the norm of the gradient is not
      finite. Then only the step is counted, and weights, optimizer and router state stay as they
      were (GLaM, arXiv 2112.06905, Sec. 5.1).
    teacher: The model to learn from; see `distill`. None means that there is none.

  Returns:
    The next state, and the metrics: loss, cross_entropy, output_z (if it has a weight),
    teacher_divergence (if there is a teacher), grad_norm
    (before clipping), grad_norms (one per parameter, in the order of the tree's leaves),
    learning_rate, the unweighted auxiliary losses, and `moe/...`, one entry per layer.
  """
  key = jax.random.fold_in(state.rng, state.step)
  total = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1).astype(jnp.float32)

  def forward(params, rows, rngs, micro):
    variables = {"params": params} | (
      {"router_state": state.router_state} if state.router_state else {}
    )
    more = {"micro": micro} if micro else {}
    if teacher is None:
      more["targets"] = rows["targets"]
    return apply(model, variables, rows, train=True, rngs=rngs, **more)

  def loss_of(params, rows, rngs, micro):
    result, aux = forward(params, rows, rngs, micro)
    # A teacher's logits are compared with all logits of the model, which are not needed otherwise.
    nats, log_z = result if teacher is None else token_nats(result, rows["targets"])
    real = rows["segment_ids"] > 0

    # The sum over each row comes first. Such shorter sums round less, and they do not depend on the
    # number of microbatches.
    def mean(values):
      return jnp.sum(jnp.sum(values * real, axis=-1)) / total

    parts = {"cross_entropy": mean(nats)}
    if output_z_loss:
      parts["output_z"] = mean(jnp.square(log_z))
    loss = parts["cross_entropy"] + output_z_loss * parts.get("output_z", 0.0)
    if teacher is not None:
      o = teacher.options
      soft = divergence(result, teacher.logits(teacher.variables, rows), o.temperature)
      parts["teacher_divergence"] = mean(soft)
      loss += (o.hard_weight - 1) * parts["cross_entropy"] + o.soft_weight * parts[
        "teacher_divergence"
      ]
    loss += sum(loss_weights[name] * value for name, value in aux.losses.items())
    return loss, ({"loss": loss} | parts | aux.losses, aux.sums)

  grads, losses, sums = accumulate(
    jax.grad(loss_of, has_aux=True),
    lambda *arguments: forward(*arguments)[1].shares,
    state.params,
    batch,
    key,
    accumulate_steps,
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  router_state = state.router_state
  if balance is not None:
    router_state = balance(router_state, sums)
  norms = jnp.stack([optax.global_norm(grad) for grad in jax.tree.leaves(grads)])
  metrics = losses | {
    "grad_norm": optax.global_norm(grads),
    "grad_norms": norms,
    "learning_rate": schedule(state.step),
  }
  metrics |= {f"moe/{name}": value for name, value in router_metrics.finish(sums).items()}
  after = state.replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    router_state=router_state,
  )
  if skip_nonfinite:
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    selected = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    after = selected.replace(step=after.step)
  return after, metrics


def eval_step(
  params: PyTree,
  router_state: PyTree,
  batch: Batch,
  byte_lengths: Int[Array, "V"],
  *,
  model: nn.Module,
) -> dict[str, Array]:
  """Returns sums over the batch's real targets, from which bits per byte are computed.

  Bits per byte are nats / (ln 2 * bytes). They allow to compare models with different tokenizers.
  The boundary of a document costs nats and stands for no byte.

  Args:
    params: The model's weights.
    router_state: The state of load balancing, or {} if there is none.
    batch: The batch; see `Batch`.
    byte_lengths: The number of bytes that each token stands for.
    model: The model, called as in `apply`.

  Returns:
    The sums `nats` (the cross-entropy), `tokens` (the real targets) and `bytes` (for which those
    tokens stand).
  """
  variables = {"params": params} | ({"router_state": router_state} if router_state else {})
  (nats, _), _ = apply(model, variables, batch, train=False, targets=batch["targets"])
  real = batch["segment_ids"] > 0
  return {
    "nats": jnp.sum(nats * real),
    "tokens": jnp.sum(real),
    "bytes": jnp.sum(byte_lengths[batch["targets"]] * real),
  }


def apply(
  model: nn.Module, variables: PyTree, batch: Batch, **kwargs: Any
) -> tuple[Any, layers.Aux]:
  """Returns the logits and the `Aux` of a batch, or nats and log Z in place of logits.

  The model is called as `(tokens, segment_ids, positions, **kwargs)`. If the batch has inputs of an
  encoder, the argument `encoder={"tokens", "segment_ids", "positions"}` is added. With the argument
  `targets` the model returns `(nats, log Z)` of each position in place of logits.
  """
  prefix = "encoder_"
  encoder_inputs = {
    name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)
  }
  if encoder_inputs:
    kwargs["encoder"] = encoder_inputs
  # Flax's annotation also covers calls with mutable collections, which return something else.
  output: Any = model.apply(
    variables, batch["inputs"], batch["segment_ids"], batch["positions"], **kwargs
  )
  return output
