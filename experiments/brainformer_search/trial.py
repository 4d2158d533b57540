"""Trains one candidate for a fixed time, in a worker process with one thread."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import statistics
import threading
import time
from typing import Any

import jax
import numpy as np

from configs import base
from experiments.brainformer_search import search
from moe_jax import accounts, assembly, data, sharding
from moe_jax.assembly.sublayers import kind, options
from moe_jax.data.options import DataOptions
from moe_jax.run import update
from moe_jax.training import evaluate, optimizers
from moe_jax.training import state as states

EXPERTS, BLOCKS, SEQ_LEN, ROWS = 8, 1, 128, 8
QUARTER = 0.25  # the share of the time after which a candidate may be stopped
EVAL_BATCHES, EVAL_ROWS = 6, 16  # of each source
BATCHES = 1500  # batches kept in memory; a candidate that needs more starts again with the first
CLOCK_STEPS = 15  # steps of GLaM's block, whose median is the unit of time


@dataclasses.dataclass(frozen=True)
class Task:
  """A candidate to train.

  Attributes:
    block: The block of the candidate.
    glam: GLaM's block, whose step is the unit of time.
    seed: Seeds the initial weights. The order of the text is the same for all seeds.
    steps: The time to train, in steps of GLaM's block.
    glam_quarter: The bits per byte of GLaM's block after a quarter of the time. None means that no
      candidate is stopped early.
  """

  block: search.Block
  glam: search.Block
  seed: int
  steps: int
  glam_quarter: float | None = None


def config(block: search.Block, seed: int = 0):
  """Returns the config of a block. Its residual stream is as wide as its widest sublayer.

  At evaluation each expert has a slot for every token. No later token then changes what an earlier
  one gets, so that the held-out bits are those of a causal model.
  """
  c = base.get_config()
  m = c.model
  m.family, m.block, m.num_layers = "brainformer", tuple(block), BLOCKS
  m.d_model = max(options(entry)["width"] for entry in block)
  m.head_dim = search.HEAD_DIM
  m.moe.num_experts = EXPERTS * any(kind(entry) == "moe" for entry in block)
  m.moe.dispatcher.name = "einsum"
  m.moe.eval_capacity_factor = float(EXPERTS)
  m.moe.allow_noncausal_routing = any(
    options(entry).get("gate") == "expert_choice" for entry in block
  )
  c.seed = seed
  c.data.seq_len, c.data.threads = SEQ_LEN, 0
  c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.schedule = 4e-3, 20, "constant"
  c.train.batch_size = ROWS
  return c


def measure(task: Task) -> dict[str, Any]:
  """Trains a candidate and returns its line of results.jsonl.

  The clock is the CPU time of this process, which has one thread. On a core of its own that is the
  wall clock, and with other work on the machine it is still close to it. The unit of time is the
  median step of GLaM's block, timed in this process right before, so that a slow machine slows
  both. Compiling and evaluating do not count.
  """
  start = time.process_time()
  model, state, step = _compiled(task.block, task.seed)
  unit = _unit(task.glam)
  budget, seconds, times, quarter = task.steps * unit, 0.0, [], None
  batches, bits = _text()[0], math.nan
  metrics = {"loss": np.float32(0)}
  while seconds < budget:
    state, took, metrics = _timed(step, state, batches[len(times) % len(batches)])
    seconds, times = seconds + took, [*times, took]
    if quarter is None and seconds >= QUARTER * budget:
      quarter = _bits(task.block, model, state)
      if task.glam_quarter is not None and search.loses(
        statistics.median(times) / unit, quarter, task.glam_quarter
      ):
        break
  stopped = seconds < budget
  if not stopped and math.isfinite(float(metrics["loss"])):
    bits = _bits(task.block, model, state)
  total, activated = accounts.parameter_counts(config(task.block), _text()[3])
  return {
    "block": list(task.block),
    "seed": task.seed,
    "bits_per_byte": _plain(bits),
    "quarter": _plain(quarter),
    "stopped": stopped,
    "steps": len(times),
    "relative_step": statistics.median(times) / unit,
    "unit_seconds": unit,
    "train_seconds": seconds,
    "cpu_seconds": time.process_time() - start,
    "parameters": total,
    "activated": activated,
  }


def prepare(parent: int) -> None:
  """Prepares a worker: it ends itself when its parent process is gone for whatever reason."""

  def watch():
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def one_thread() -> None:
  """Lets each worker process that starts from here on compute on one thread."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  # The last two flags let programs compile in two thirds of the time.
  os.environ["XLA_FLAGS"] = " ".join(
    [
      os.environ.get("XLA_FLAGS", ""),
      "--xla_cpu_multi_thread_eigen=false",
      "--xla_backend_optimization_level=1",
      "--xla_llvm_disable_expensive_passes=true",
    ]
  )
  for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"


@contextlib.contextmanager
def _one_core():
  """Lets a CPU client that is made inside have threads for one core only.

  The process may run on any core afterwards.
  """
  if not hasattr(os, "sched_setaffinity"):
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {min(before)})
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


@functools.cache
def _mesh():
  with _one_core():
    return sharding.make_mesh({"data": 1})


@functools.cache
def _text():
  """Returns what all candidates share.

  These are the training batches, the tokenizer, the sources, the size of the vocabulary, and the
  fingerprints of the text.
  """
  c = config(("attention:width=16,heads=1",))
  data_options = DataOptions.of(c.data)
  tokenizer, sources = data.tokenizer_of(data_options), data.make_sources(data_options)
  with contextlib.closing(data.train_iterator(data_options, tokenizer, sources, ROWS)) as stream:
    batches = [jax.tree.map(np.asarray, next(stream)) for _ in range(BATCHES)]
  return (
    batches,
    tokenizer,
    sources,
    data.vocab_size(data_options, tokenizer),
    data.fingerprints(sources),
  )


def fingerprints(_: None = None) -> dict[str, str]:
  """Returns the fingerprints of the text that the workers read."""
  return _text()[4]


def _compiled(block: search.Block, seed: int):
  """Returns the model, its initial state and its compiled training step."""
  c = config(block, seed)
  assembly.validate(c, 1)
  mesh = _mesh()
  model = assembly.model(c, _text()[3], mesh)
  optimizer, schedule = optimizers.make(optimizers.OptimizerOptions.of(c.optimizer), c.train.steps)
  _, draw = states.create(mesh, model, optimizer, seed, SEQ_LEN, ROWS)
  state = draw()
  return (
    model,
    state,
    update.make(c, model, optimizer, schedule).lower(state, _text()[0][0]).compile(),
  )


_GLAM: dict[search.Block, list] = {}  # block -> [state, compiled step]


def _unit(block: search.Block) -> float:
  """Measures the CPU seconds of a step of GLaM's block now."""
  if block not in _GLAM:
    _GLAM[block] = list(_compiled(block, 0)[1:])
  times = []
  for batch in _text()[0][:CLOCK_STEPS]:
    _GLAM[block][0], took, _ = _timed(_GLAM[block][1], _GLAM[block][0], batch)
    times.append(took)
  return statistics.median(times)


def _timed(step, state, batch):
  """Returns the new state, the CPU seconds of the step, and its metrics."""
  start = time.process_time()
  state, metrics = jax.block_until_ready(step(state, batch))
  return state, time.process_time() - start, metrics


def _bits(block: search.Block, model, state) -> float:
  """Returns the held-out bits per byte, averaged over the sources."""
  return statistics.fmean(_evaluator(block, model)(state).values())


@functools.lru_cache(maxsize=1)
def _evaluator(block: search.Block, model):
  """Returns a function from a state to the held-out bits per byte of each source."""
  c = config(block)
  _, tokenizer, sources, _, _ = _text()
  evaluate_state = evaluate.make_eval(
    DataOptions.of(c.data), EVAL_ROWS, dict(c.sharding), model, _mesh(), tokenizer, sources
  )

  def bits(state):
    summary = evaluate.summary(evaluate_state(state, EVAL_BATCHES))
    return {name: value for name, value in summary.items() if name.startswith("bits_per_byte/")}

  return bits


def _plain(value: float | None) -> float | None:
  """Returns a value that JSON has: None for what is not finite."""
  return value if value is not None and math.isfinite(value) else None
