"""The training loop, which is the only place that logs, saves and reads the clock."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax import accounts, assembly, data, distributed, sharding
from moe_jax.data.dynamic import DynamicOptions, next_weights
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError
from moe_jax.routing import metrics as router_metrics
from moe_jax.run import finish, teacher
from moe_jax.run import update as updates
from moe_jax.run.watch import Profile, Watch
from moe_jax.training import digest, evaluate, full_disk, optimizers, workdir
from moe_jax.training import state as states
from moe_jax.training.checkpoints import Checkpoints, Restored
from moe_jax.training.guard import Guard, GuardOptions
from moe_jax.training.interrupt import Interrupt
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.options import TrainOptions
from moe_jax.training.progress import Progress, working


# The fields' types are not checked at run time, so that tests can pass objects that do no I/O.
@typing.no_type_check
@dataclasses.dataclass
class Run:
  """Everything that the steps of one start of a run need.

  Attributes:
    options: The options of the section `train`.
    objective: What is learned, a key of `evaluate.MEASURES`.
    mesh: The mesh on which the state lives.
    update: The jitted function (state, batch) -> (state, metrics), which donates the state.
    draw: A function that makes the state before the first step.
    abstract: The shapes, dtypes and shardings of the state.
    evaluate: A function (state, number of batches) -> totals.
    batches: The iterator of the training data, which also has `get_state` and `set_state`, and with
      `dynamic` those by which shares change; see `data.train_iterator`.
    checkpoints: The checkpoints of the run.
    writer: The writer of metrics and events.
    progress: The display of the progress.
    interrupt: The flag that a signal sets.
    guard: The guard, which judges each step.
    parameters: The paths of the weights, in the order of the metric "grad_norms".
    layers: The names of the layers with experts.
    divided: The number of experts that a mesh may divide: those that have an FFN.
    clock: What `time.monotonic()` would have shown at the run's first step if the run had never
      been interrupted.
    deadline: The value of `time.monotonic()` at which this start saves and stops.
    profile: The profile of some steps; None means that there is none.
    dynamic: The options of the section `data.dynamic`.
  """

  options: TrainOptions
  objective: str
  mesh: jax.sharding.Mesh
  update: Callable
  draw: Callable[[], states.TrainState]
  abstract: states.TrainState
  evaluate: Callable[..., evaluate.Totals]
  batches: Any
  checkpoints: Checkpoints
  writer: MetricsWriter
  progress: Progress
  interrupt: Interrupt
  guard: Guard
  parameters: list[str]
  layers: list[str]
  divided: int
  clock: float = 0.0
  deadline: float = math.inf
  profile: Profile | None = None
  dynamic: DynamicOptions = DynamicOptions()


def train(
  config, directory: pathlib.Path, start: dict[str, Any], watch: Watch | None = None
) -> bool:
  """Trains until `train.steps`, a signal or `train.max_minutes`.

  The run continues from the last checkpoint in the workdir, if there is one. Of a run that has
  ended with this config and has all of its results, these are shown, and nothing else is done.

  Args:
    config: A config that `assembly.validate` and `workdir.check` accept.
    directory: The workdir.
    start: What `meta.json` will hold of this start: config (its path) and command.
    watch: A tracker and a profile of some steps; None means that there are none.

  Returns:
    Whether the run is complete. It is not after a signal or `train.max_minutes`.

  Raises:
    ConfigError: If the data are missing or not those that the run began with, if no checkpoint is
      undamaged, if the disk is full, if the tracker refuses the run, or if there is no such
      teacher.
    Diverged: If the loss, a gradient or a weight is not finite. The last checkpoint is older.
  """
  first, begun = jax.process_index() == 0, time.monotonic()
  # The results are shown without reading data or compiling; all processes agree on that.
  if not distributed.any_process(not workdir.has_ended(directory, config)):
    if first:
      finish.show_end(directory)
    return True
  watch = watch or Watch()
  data_options = DataOptions.of(config.data)
  train_options = TrainOptions.of(config.train)
  if first:
    print(
      f"{start['config']} -> {directory}; reading {', '.join(data_options.sources)}", flush=True
    )
  with full_disk.told("workdir", directory), contextlib.ExitStack() as stack:
    tokenizer = data.tokenizer_of(data_options)
    sources = data.make_sources(data_options)
    mesh = sharding.make_mesh(dict(config.mesh))
    facts = {
      "config": start["config"],
      "data": data.fingerprints(sources),
      "tokenizer": tokenizer.fingerprint,
    }
    workdir.check_data(directory, facts["data"], facts["tokenizer"])
    vocab_size = data.vocab_size(data_options, tokenizer)
    model = assembly.model(config, vocab_size, mesh)
    optimizer, schedule = optimizers.make(
      optimizers.OptimizerOptions.of(config.optimizer), train_options.steps
    )
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(sharding.use_rules(dict(config.sharding)))
    learn_from = teacher.load(config, mesh, vocab_size, facts["tokenizer"])
    index, count = sharding.reader(mesh)
    batches = stack.enter_context(
      contextlib.closing(
        data.train_iterator(
          data_options,
          tokenizer,
          sources,
          train_options.batch_size,
          process_index=index,
          process_count=count,
        )
      )
    )
    if first:
      workdir.claim(directory, config)
      stack.enter_context(workdir.exclusive(directory))
    checkpoints = stack.enter_context(
      Checkpoints(directory / "checkpoints", train_options.keep_last, train_options.keep_best)
    )
    # This is left before `checkpoints`, whose exit would wait for a process that has failed.
    stack.enter_context(distributed.together())
    abstract, draw = _creation(config, mesh, model, optimizer)
    checkpoints.begin = functools.partial(states.begin, abstract, optimizer, config.seed)
    guard = Guard(GuardOptions.of(config.train.guard))
    state, seconds, sentences = _begin(
      train_options.steps, draw, abstract, checkpoints, batches, guard
    )
    n, tokens = int(state.step), train_options.batch_size * data_options.seq_len
    if first:
      devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
      workdir.note_start(directory, config, facts, start | {"step": n, "devices": devices})
    writer = stack.enter_context(
      contextlib.closing(
        MetricsWriter(
          directory,
          n,
          n + guard.skipped_batches,
          first,
          watch.boards(directory, config.to_dict()) if first else (),
        )
      )
    )
    progress = stack.enter_context(
      contextlib.closing(Progress(train_options.steps, n, tokens, active=first))
    )
    for sentence in [*sentences, *[writer.told] * bool(writer.told)]:
      progress.say(f"warning: {sentence}")
    _introduce(config, progress, vocab_size, mesh, n)
    eval_fn = evaluate.make_eval(
      data_options, train_options.microbatch, dict(config.sharding), model, mesh, tokenizer, sources
    )
    run = Run(
      train_options,
      data_options.objective,
      mesh,
      updates.make(config, model, optimizer, schedule, learn_from),
      draw,
      abstract,
      eval_fn,
      batches,
      checkpoints,
      writer,
      progress,
      stack.enter_context(Interrupt()),
      guard,
      list(digest.paths(state.params)),
      assembly.names_of_layers_with_experts(config),
      assembly.divided_experts(config),
      time.monotonic() - seconds,
      begun + 60 * train_options.max_minutes if train_options.max_minutes else math.inf,
      stack.enter_context(contextlib.closing(Profile(directory / "profile", n, watch.profile))),
      DynamicOptions.of(config.data.dynamic),
    )
    state, stopped = _steps(run, state)
    seconds, n = time.monotonic() - run.clock, int(state.step)

  if stopped:
    progress.say(
      f"stopped by {stopped} after step {n} of {train_options.steps}; saved in {directory}; the "
      "same command goes on from there"
    )
    return False
  finish.finish(
    config,
    directory,
    model,
    state,
    tokenizer,
    sources,
    mesh,
    eval_fn,
    start | {"steps": n, "tokens": n * tokens, "wall_seconds": seconds},
  )
  return True


def determinism(config) -> list[str]:
  """Returns which arrays differ if the first step is done twice on the same state and batch.

  The arrays are those of the next state and the metrics of the step, with names such as
  "metrics/loss". An empty list means that the step is deterministic. Nothing is written.

  Args:
    config: A config that `assembly.validate` accepts.
  """
  data_options = DataOptions.of(config.data)
  train_options = TrainOptions.of(config.train)
  tokenizer, sources = data.tokenizer_of(data_options), data.make_sources(data_options)
  mesh = sharding.make_mesh(dict(config.mesh))
  vocab_size = data.vocab_size(data_options, tokenizer)
  model = assembly.model(config, vocab_size, mesh)
  optimizer, schedule = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), train_options.steps
  )
  with (
    jax.set_mesh(mesh),
    sharding.use_rules(dict(config.sharding)),
    working("compiling the step", print),
  ):
    index, count = sharding.reader(mesh)
    with contextlib.closing(
      data.train_iterator(
        data_options,
        tokenizer,
        sources,
        train_options.batch_size,
        process_index=index,
        process_count=count,
      )
    ) as batches:
      batch = evaluate.put(mesh, next(batches))
    _, draw = _creation(config, mesh, model, optimizer)
    learn_from = teacher.load(config, mesh, vocab_size, tokenizer.fingerprint)
    update = updates.make(config, model, optimizer, schedule, learn_from)
    once, again = (
      {"state": state, "metrics": metrics}
      for state, metrics in (update(draw(), batch) for _ in range(2))
    )
    once, again = (digest.examine(result).digests for result in (once, again))
  return [name for name in once if once[name] != again[name]]


def _creation(
  config, mesh, model, optimizer
) -> tuple[states.TrainState, Callable[[], states.TrainState]]:
  """Returns `(abstract, draw)` of the state before the first step; see `states.create`."""
  rows = TrainOptions.of(config.train).microbatch
  return states.create(mesh, model, optimizer, config.seed, config.data.seq_len, rows)


def _begin(
  steps, draw, abstract, checkpoints, batches, guard
) -> tuple[states.TrainState, float, list[str]]:
  """Returns the state from which this start trains.

  It is that of the newest undamaged checkpoint, which also restores the guard and the position in
  the data, or a new one if there is no checkpoint.

  Returns:
    The state; the seconds that the run has trained; and sentences to show.
  """
  if checkpoints.resumed_step(steps) is None:
    return draw(), 0.0, []
  restored = checkpoints.restore(abstract)
  if not restored.data:
    # Imported weights have no place in the data, of which the run begins with the first batch.
    return restored.state, 0.0, restored.told
  guard.restore(restored.meta["guard"])
  read = data.batches_of(restored.data)
  expected = restored.step + guard.skipped_batches
  if read not in (None, expected):
    raise ConfigError(
      "checkpoint",
      str(checkpoints.directory / str(restored.step)),
      f"its place in the data is batch {read}, but {restored.step} steps and "
      f"{guard.skipped_batches} batches that were skipped should make {expected}; restore this "
      "directory from a copy, or start anew with another --workdir",
    )
  batches.set_state(restored.data)
  return restored.state, restored.meta["seconds"], restored.told


def _introduce(config, progress, vocab_size: int, mesh, step: int) -> None:
  """Shows the size of the model, its routing, and how large parts of a step are computed."""
  total, activated = accounts.parameter_counts(config, vocab_size)
  progress.say(
    f"{total:,} parameters, {activated:,} of them activated by a token, on {mesh.size} devices; "
    + (f"going on from step {step}" if step else "a new run")
  )
  for summary in (
    accounts.routing_summary(config),
    accounts.step_summary(config, vocab_size, sharding.platform(mesh)),
  ):
    for line in summary.splitlines():
      progress.say(line)


def _steps(run: Run, state: states.TrainState) -> tuple[states.TrainState, str]:
  """Does the remaining steps.

  Returns:
    The state after the last step, and what stopped the run before its end ("" if nothing did).
  """
  t, n = run.options, int(state.step)
  begun, unread = n, []
  while n < t.steps:
    n += 1

    def due(every, n=n):
      return n % every == 0 or n == t.steps

    if run.profile:
      run.profile.before(n)
    with (
      working("compiling the training step", run.progress.say)
      if n == begun + 1
      else contextlib.nullcontext()
    ):
      state, metrics = run.update(state, evaluate.put(run.mesh, next(run.batches)))
    if run.profile and (said := run.profile.after(n, metrics)):
      run.progress.say(said)
    stop = _asked_to_stop(run, n)
    # Reading a loss waits for its step. In general the loss is read one step late, so that the
    # device never waits for this thread. It is read at once if the next step depends on it, or if
    # something is done after this step that needs it.
    read_now = (
      run.guard.watches
      or stop
      or n == begun + 1
      or any(map(due, (t.log_every, t.eval_every, t.checkpoint_every)))
    )
    unread.append((n, metrics))
    must_go_back = False
    while len(unread) > (0 if read_now else 1):
      loss, must_go_back = _judged(run, *unread.pop(0))
    if must_go_back:
      state = _go_back(run, n)
      n = int(state.step)
      continue
    if due(t.log_every):
      _log(run, n, metrics, loss)
    paused, score = time.monotonic(), None
    if due(t.eval_every):
      score = _evaluate(run, n, state)
    # In the middle of a row of bad steps it is not yet known whether they will be undone. Nothing
    # is saved then, so that the last checkpoint is from before them. A run that stops here will do
    # these steps again.
    if (due(t.checkpoint_every) or stop) and (not run.guard.streak or n == t.steps):
      meta = {"seconds": time.monotonic() - run.clock, "guard": run.guard.state()}
      run.checkpoints.save(n, state, run.batches.get_state(), meta, score)
    run.progress.pause(time.monotonic() - paused)
    if stop:
      return state, stop
  return state, ""


def _judged(run: Run, n: int, metrics: dict[str, Any]) -> tuple[float, bool]:
  """Lets the guard judge step `n`, and shows and writes the events.

  Returns:
    The loss of the step, and whether the run must go back to a checkpoint.
  """
  loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
  tensor = ""
  if not math.isfinite(norm):
    norms = np.asarray(metrics["grad_norms"])
    tensor = next(
      (name for name, x in zip(run.parameters, norms, strict=True) if not math.isfinite(x)), ""
    )
  kept = "" if math.isfinite(loss) and math.isfinite(norm) else run.checkpoints.kept()
  events = run.guard.judge(n, loss, norm, tensor, kept)
  must_go_back = bool(events) and events[-1]["event"] == "rollback"
  # `_go_back` reports the rollback itself.
  for event in events[:-1] if must_go_back else events:
    _tell(run, n, event)
  run.progress.step(n, loss)
  return loss, must_go_back


def _go_back(run: Run, n: int) -> states.TrainState:
  """Goes back to the newest healthy checkpoint, and returns its state.

  If there is none, the run begins anew. The data iterator is not moved, so that the batches up to
  step `n` are skipped. Shares of the sources that follow the losses are those of the checkpoint.
  """
  run.checkpoints.wait()
  healthy = run.guard.healthy_before(n)
  if any(step < healthy for step in run.checkpoints.steps()):
    restored = run.checkpoints.restore(run.abstract, before=healthy)
    run.guard.restore(restored.meta["guard"], keep_counts=True)
  else:
    # No healthy checkpoint has been saved yet.
    restored = Restored(0, run.draw(), {}, {}, [])
    run.guard.losses, run.guard.starved = [], []
  batch = n + run.guard.skipped_batches
  run.guard.went_back(n, restored.step)
  if run.dynamic.every:
    run.batches.take_shares(restored.data)
  run.checkpoints.drop_after(restored.step)
  run.writer.forget_after(restored.step)
  _tell(
    run,
    restored.step,
    {
      "event": "rollback",
      "message": f"after step {n} the run went back to step "
      f"{restored.step}, and {n - restored.step} batches are skipped",
    },
    batch,
  )
  run.progress.went_back(restored.step)
  return restored.state


def _log(run: Run, n: int, metrics: dict[str, Any], loss: float) -> None:
  """Writes and shows the metrics of step `n`, and warns of experts that are starved."""
  load = metrics.get("moe/load")
  for event in run.guard.watch_load(None if load is None else np.asarray(load), run.layers):
    _tell(run, n, event)
  run.progress.routing = routing_words(metrics)
  written = {name: value for name, value in metrics.items() if name != "grad_norms"}
  written |= _spread(load, run.mesh.shape["expert"], run.divided)
  run.writer.write(n, "train", written | {"tokens_per_second": run.progress.log(loss)})


def _spread(load: Any, devices: int, divided: int) -> dict[str, np.ndarray]:
  """Returns what the loads of all layers say about experts and devices; {} without experts.

  Args:
    load: The metric "moe/load" [Lm, E], or None.
    devices: The number of devices among which the mesh divides the experts.
    divided: The number of experts that it may divide, the first ones. Others, without an FFN, are
      on every device.
  """
  if load is None:
    return {}
  load = np.asarray(load)
  spread = {"moe/load_percentiles": router_metrics.load_percentiles(load)}
  # Layers whose number of experts the mesh does not divide are not divided.
  if devices > 1 and divided % devices == 0:
    busy = load[..., :divided]
    if divided < load.shape[-1]:
      # Shares of what devices must do. If that is nothing, they stay 0.
      work = busy.sum(-1, keepdims=True)
      busy = busy / np.where(work > 0, work, 1.0)
    spread["moe/device_overload"] = router_metrics.device_overload(busy, devices)
  return spread


def routing_words(metrics: Mapping[str, Any]) -> str:
  """Returns how a step's routers used their experts, in a few words, or "" without experts.

  The words give the largest drop rate of a layer, if anything was dropped; the largest load of an
  expert as a multiple of an even load; and the largest magnitude of a router's logit.
  """
  if "moe/load" not in metrics:
    return ""
  load = np.asarray(metrics["moe/load"])
  dropped = float(np.max(metrics["moe/drop_rate"]))
  return (
    (f"dropped {dropped:.1%}, " if dropped else "")
    + f"max load {load.max() * load.shape[-1]:.1f}x, "
    + f"max logit {float(np.max(metrics['moe/logit_max'])):.1f}"
  )


def _tell(run: Run, step: int, event: dict[str, Any], batch: int | None = None) -> None:
  """Shows an event as a warning, and writes it with the number of the batch of its step.

  Args:
    run: The run.
    step: The step at which the event happened.
    event: The event, as `Guard` describes it.
    batch: The number of the batch. None means that of `step`.
  """
  run.progress.say(f"warning: {event['message']}")
  run.progress.trouble = run.guard.summary()
  run.writer.event(
    step, event | {"batch": step + run.guard.skipped_batches if batch is None else batch}
  )


def _evaluate(run: Run, n: int, state: states.TrainState) -> float:
  """Evaluates on the validation text, writes and shows the result, and returns the measure.

  If the shares of the sources are due to change after step `n`, they follow from the result.
  """
  measure, words = evaluate.MEASURES[run.objective]
  with working("evaluating", run.progress.say):
    result = evaluate.summary(run.evaluate(state, run.options.eval_batches), measure)
  run.writer.write(n, "eval", result)
  run.progress.say(
    f"step {n}/{run.options.steps}  validation {words}: " + _by_source(result, measure)
  )
  # The last step counts, too, so that a run that is made longer later goes on as one that was as
  # long from the start.
  if run.dynamic.every and n % run.dynamic.every == 0:
    _change_shares(run, n, result)
  return result[measure]


def _change_shares(run: Run, n: int, result: Mapping[str, float]) -> None:
  """Changes the shares of the sources by their losses after step `n`, and writes and shows both.

  They stay if a loss is not finite, which is told.
  """
  losses = {name.removeprefix("loss/"): x for name, x in result.items() if name.startswith("loss/")}
  if wrong := [name for name, loss in losses.items() if not math.isfinite(loss)]:
    message = (
      f"after step {n} the shares of the sources stay as they were, because the validation loss of "
      f"{wrong[0]} is {losses[wrong[0]]}"
    )
    return _tell(run, n, {"event": "shares_kept", "message": message})
  before, d = run.batches.shares, run.dynamic
  after = next_weights(before, list(losses.values()), d.references, d.positive, d.smoothing)
  run.batches.change_shares(after)
  shares = dict(zip(losses, after, strict=True))
  run.writer.write(
    n,
    "mixture",
    {f"share/{name}": share for name, share in shares.items()}
    | {f"loss/{name}": loss for name, loss in losses.items()},
  )
  run.progress.say(
    f"step {n}/{run.options.steps}  shares of the next batches: "
    + "  ".join(
      f"{name} {old:.3f} -> {new:.3f}"
      for (name, new), old in zip(shares.items(), before, strict=True)
    )
  )


def _asked_to_stop(run: Run, n: int) -> str:
  """Returns the reason to stop after this step in words, or "" if there is none."""
  # The clocks of several processes differ, so the processes have to agree that it is late. They
  # communicate for that only as often as they log.
  checks_clock = run.deadline < math.inf and (
    jax.process_count() == 1 or n % run.options.log_every == 0
  )
  late = checks_clock and distributed.any_process(time.monotonic() > run.deadline)
  # Orbax makes all processes agree on the step at which they stop.
  if jax.process_count() > 1 and run.checkpoints.reached_preemption(n):
    return "preemption"
  return run.interrupt.name or (f"train.max_minutes={run.options.max_minutes:g}" if late else "")


def _by_source(result: dict[str, float], measure: str) -> str:
  """Returns the measure of each source as text."""
  prefix = f"{measure}/"
  return "  ".join(
    f"{name.removeprefix(prefix)} {x:.3f}" for name, x in result.items() if name.startswith(prefix)
  )
