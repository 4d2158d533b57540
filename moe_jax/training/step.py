"""One update and one evaluation, as pure functions: no I/O, no clock, no global; jit them, vmap
them over seeds."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from moe_jax.models import update_router_state
from moe_jax.routing import metrics as router_metrics
from moe_jax.training.accumulate import Batch, accumulate
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
  bias_update_rate: float = 0.0,
  skip_nonfinite: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
  """One update: loss = cross-entropy + output z-loss + sum of weighted auxiliary losses.

  The cross-entropy (nats) is the mean over the batch's real targets. Losses, metrics and the update
  are those of the whole batch, also where it is cut into microbatches: see `accumulate` for what
  that costs and where it does not hold.

  Args:
    state: donate it.
    batch: see `Batch`.
    model: called as in `apply`.
    optimizer, schedule: of `optimizers.make`; the schedule is only reported.
    loss_weights: weight of each of `Aux.losses`.
    accumulate_steps: microbatches; divides B.
    output_z_loss: weight of the mean of log^2 Z of the output softmax.
    bias_update_rate: step of the loss-free balancing bias; 0 leaves `router_state` alone.
    skip_nonfinite: where the loss or the norm of the gradient is not finite only the step is
      counted: weights, optimizer and router state stay as they were (GLaM, arXiv 2112.06905, Sec.
      5.1).

  Returns:
    The next state, and metrics: loss, cross_entropy, grad_norm (before clipping), grad_norms (of
      each parameter, in the
    order of the tree's leaves), learning_rate, the unweighted auxiliary losses, and `moe/...` by
      layer.
  """
  key = jax.random.fold_in(state.rng, state.step)
  total = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1).astype(jnp.float32)

  def forward(params, rows, rngs, micro):
    variables = {"params": params} | (
      {"router_state": state.router_state} if state.router_state else {}
    )
    return apply(
      model, variables, rows, train=True, rngs=rngs, **({"micro": micro} if micro else {})
    )

  def loss_of(params, rows, rngs, micro):
    logits, aux = forward(params, rows, rngs, micro)
    nats, log_z = token_nats(logits, rows["targets"])
    real = rows["segment_ids"] > 0

    # Over each row first: shorter sums round less, and are the same into however many microbatches
    # the rows are cut.
    def mean(values):
      return jnp.sum(jnp.sum(values * real, axis=-1)) / total

    parts = {"cross_entropy": mean(nats)}
    if output_z_loss:
      parts["output_z"] = mean(jnp.square(log_z))
    loss = parts["cross_entropy"] + output_z_loss * parts.get("output_z", 0.0)
    loss += sum(loss_weights[name] * value for name, value in aux.losses.items())
    return loss, ({"loss": loss} | parts | aux.losses, aux.sums)

  grads, losses, sums = accumulate(
    jax.grad(loss_of, has_aux=True),
    lambda *part: forward(*part)[1].shares,
    state.params,
    batch,
    key,
    accumulate_steps,
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  router_state = state.router_state
  if bias_update_rate:
    router_state = update_router_state(router_state, sums["assigned"], bias_update_rate)
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
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
    after = kept.replace(step=after.step)
  return after, metrics


def eval_step(
  params: PyTree,
  router_state: PyTree,
  batch: Batch,
  byte_lengths: Int[Array, "V"],
  *,
  model: nn.Module,
) -> dict[str, Array]:
  """Sums over the batch's real targets: `nats`, `tokens`, and `bytes` that those tokens stand for.

  Bits per byte = nats / (ln 2 * bytes); it compares models whatever their tokenizers. A document's
  boundary costs nats and stands for no byte.
  """
  variables = {"params": params} | ({"router_state": router_state} if router_state else {})
  logits, _ = apply(model, variables, batch, train=False)
  nats, _ = token_nats(logits, batch["targets"])
  real = batch["segment_ids"] > 0
  return {
    "nats": jnp.sum(nats * real),
    "tokens": jnp.sum(real),
    "bytes": jnp.sum(byte_lengths[batch["targets"]] * real),
  }


def apply(model: nn.Module, variables: PyTree, batch: Batch, **kwargs):
  """What the model makes of a batch: `(tokens, segment_ids, positions, **kwargs) -> (logits, Aux)`.

  A batch with an encoder's inputs adds `encoder={"tokens", "segment_ids", "positions"}`.
  """
  prefix = "encoder_"
  source = {
    name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)
  }
  if source:
    kwargs["encoder"] = source
  return model.apply(variables, batch["inputs"], batch["segment_ids"], batch["positions"], **kwargs)


def token_nats(
  logits: Float[Array, "B L V"], targets: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
  """`(-log p(target), log Z)` for each position, in float32."""
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z
