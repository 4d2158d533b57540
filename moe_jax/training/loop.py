"""The loop: the one place that logs, saves and reads the clock."""

from __future__ import annotations

import contextlib
import math
import pathlib
import time
from typing import Any

import jax

from moe_jax import build, data, distributed, sharding
from moe_jax.training import evaluate, finish, optimizers, workdir
from moe_jax.training import state as states
from moe_jax.training import update as updates
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.interrupt import Interrupt
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.progress import Progress


class Diverged(RuntimeError):
  """The loss or a gradient is no longer a finite number."""


def train(config, directory: pathlib.Path, start: dict[str, Any]) -> bool:
  """Trains until `train.steps`, or until a signal; goes on where the workdir's last checkpoint left off.

  Args:
    config: checked already (`build.validate`, `workdir.check`).
    directory: the workdir.
    start: what `meta.json` shall remember of this start: config (its path), command.

  Returns:
    Whether the run is complete; False after a signal.

  Raises:
    ConfigError: the data are missing or not those that the run began with, a checkpoint is damaged.
    Diverged: the loss is NaN or infinite; the last checkpoint is from before.
  """
  first = jax.process_index() == 0
  if first:
    print(f"{start['config']} -> {directory}; reading {', '.join(config.data.sources)}", flush=True)
  tokenizer = data.tokenizer_of(config.data)
  sources = data.make_sources(config.data)
  mesh = sharding.make_mesh(dict(config.mesh))
  facts = {"config": start["config"], "data": data.fingerprints(sources), "tokenizer": tokenizer.fingerprint}
  workdir.check_data(directory, facts["data"])
  vocab_size = data.vocab_size(config.data, tokenizer)
  model = build.model(config, vocab_size, mesh)
  optimizer, schedule = optimizers.make(config.optimizer, config.train.steps)
  eval_fn = evaluate.make_eval(config, model, mesh, tokenizer, sources)
  update = updates.make(config, model, optimizer, schedule)
  tokens = config.train.batch_size * config.data.seq_len

  with jax.set_mesh(mesh), sharding.use_rules(dict(config.sharding)), contextlib.ExitStack() as stack:
    index, count = sharding.reader(mesh)
    batches = stack.enter_context(contextlib.closing(data.train_iterator(
        config.data, tokenizer, sources, config.train.batch_size, process_index=index, process_count=count)))
    if first:
      workdir.claim(directory, config)
      stack.enter_context(workdir.exclusive(directory))
    checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints"))
    stack.enter_context(distributed.together())  # to leave `checkpoints` is to wait for all processes
    state, seconds = _begin(config, mesh, model, optimizer, checkpoints, batches)
    begun = int(state.step)
    if first:
      devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
      workdir.note_start(directory, config, facts, start | {"step": begun, "devices": devices})
    writer = stack.enter_context(contextlib.closing(MetricsWriter(directory, begun, active=first)))
    progress = stack.enter_context(contextlib.closing(Progress(config.train.steps, begun, tokens, active=first)))
    total, activated = build.parameter_counts(config, vocab_size)
    progress.say(f"{total:,} parameters, {activated:,} of them activated by a token, on {mesh.size} devices; " + (
        f"going on from step {begun}" if begun else "a new run"))
    for line in build.routing_summary(config).splitlines():
      progress.say(line)
    interrupt = stack.enter_context(Interrupt())
    clock = time.monotonic() - seconds
    state, stopped = _steps(config, state, batches, update, mesh, eval_fn, checkpoints, writer, progress, interrupt,
                            clock)
    seconds, n = time.monotonic() - clock, int(state.step)

  if stopped:
    progress.say(f"stopped by {interrupt.name or 'preemption'} after step {n} of {config.train.steps}; saved in "
                 f"{directory}; the same command goes on from there")
    return False
  finish.finish(config, directory, model, state, tokenizer, sources, mesh, eval_fn,
                start | {"steps": n, "tokens": n * tokens, "wall_seconds": seconds})
  return True


def _steps(config, state, batches, update, mesh, eval_fn, checkpoints, writer, progress, interrupt, clock):
  """`(state, whether a signal stopped it)` after the remaining steps."""
  t, begun, unread = config.train, int(state.step), []
  for n in range(begun + 1, t.steps + 1):
    due = lambda every, n=n: n % every == 0 or n == t.steps
    state, metrics = update(state, evaluate.put(mesh, next(batches)))
    stop = _asked_to_stop(interrupt, checkpoints, n)
    now = n == begun + 1 or stop or any(map(due, (t.log_every, t.eval_every, t.checkpoint_every)))
    # Between events the loss is read one step late, so that the device never waits for this thread.
    unread.append((n, metrics))
    while len(unread) > (0 if now else 1):
      m, loss = unread[0][0], _finite(*unread.pop(0), checkpoints)
      progress.step(m, loss)
    if due(t.log_every):
      writer.write(n, "train", metrics | {"tokens_per_second": progress.log(loss)})
    paused, score = time.monotonic(), None
    if due(t.eval_every):
      measure, words = evaluate.MEASURES[config.data.objective]
      result = evaluate.summary(eval_fn(state, t.eval_batches), measure)
      score = result[measure]
      writer.write(n, "eval", result)
      progress.say(f"step {n}/{t.steps}  validation {words}: " + _by_source(result, measure))
    if due(t.checkpoint_every) or stop:
      checkpoints.save(n, state, batches.get_state(), {"seconds": time.monotonic() - clock}, score)
    progress.pause(time.monotonic() - paused)
    if stop:
      return state, True
  return state, False


def _begin(config, mesh, model, optimizer, checkpoints, batches):
  """`(state, seconds trained)`: freshly drawn, or of the last checkpoint; then `batches` stand where it stood."""
  rows = config.train.batch_size // config.train.accumulate_steps
  abstract, draw = states.create(mesh, model, optimizer, config.seed, config.data.seq_len, rows)
  if checkpoints.resumed_step(config.train.steps) is None:
    return draw(), 0.0
  state, place, meta = checkpoints.restore(abstract)
  batches.set_state(place)
  return state, meta["seconds"]


def _asked_to_stop(interrupt, checkpoints, n: int) -> bool:
  if jax.process_count() > 1:  # all processes agree on the step
    return checkpoints.reached_preemption(n)
  return bool(interrupt.name)


def _finite(n: int, metrics, checkpoints) -> float:
  """The loss of step `n`, once it is known to be a number."""
  loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
  if math.isfinite(loss) and math.isfinite(norm):
    return loss
  checkpoints.wait()
  last = checkpoints.latest_step()
  kept = f"checkpoint {checkpoints.directory / str(last)} is from before" if last else "there is no checkpoint yet"
  raise Diverged(f"training has diverged: at step {n} the loss is {loss} and the gradient's norm {norm}; {kept}; try a "
                 "lower optimizer.learning_rate, a longer optimizer.warmup_steps or a smaller optimizer.clip_norm")


def _by_source(result: dict[str, float], measure: str) -> str:
  prefix = f"{measure}/"
  return "  ".join(f"{name.removeprefix(prefix)} {x:.3f}" for name, x in result.items() if name.startswith(prefix))
