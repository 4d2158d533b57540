"""Times a whole training step beside transformers and torch, with the same weights and batch.

Both sides train a model of Mixtral's architecture with top-2 of 8 experts in every layer, in
float32, with two threads each: forward, backward, clipping of the gradient's norm, and AdamW. The
loss is the cross-entropy alone. Rounds are interleaved in one process: in each, every side does one
step. The losses of the first step, before any update, are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench import generation
from experiments.bench.dispatchers import Progress, environment
from experiments.bench.generation import THREADS, Shape
from experiments.common.command_line import check_counts, check_folder
from moe_jax.errors import ConfigError, choose


class Case(NamedTuple):
  """A model and its batch of `rows` rows of `length` tokens."""

  shape: Shape
  rows: int
  length: int


CASES = {
  "D128": Case(Shape(128, 384, 4, 4, 260, 4), 16, 128),
  "D512": Case(Shape(512, 1024, 4, 8, 8192, 8, 64), 4, 512),
}
# transformers' ways to compute experts of which one is the fastest on a CPU.
THEIRS = ("eager", "grouped_mm")
RATE, CLIP = 1e-4, 1.0


def their_step(model: Any, tokens: np.ndarray) -> Callable[[], float]:
  """Returns a function that does one step of transformers' model and returns its loss (nats)."""
  import torch

  inputs = torch.tensor(tokens[:, :-1])
  targets = torch.tensor(tokens[:, 1:])
  # Of torch's forms of AdamW, the fused one is the fastest on a CPU.
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
  )
  model.train()

  def step() -> float:
    optimizer.zero_grad(set_to_none=True)
    logits = model(inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.item()

  return step


def our_step(case: Case, variables: dict[str, Any], tokens: np.ndarray) -> Callable[[], float]:
  """Returns a function that does one step of this package's model and returns its loss (nats).

  Args:
    case: The model and its batch.
    variables: The first weights.
    tokens: One token more for each row than the model reads.
  """
  from moe_jax import assembly, sharding
  from moe_jax.run import update
  from moe_jax.training import evaluate, optimizers
  from moe_jax.training.state import TrainState

  config = our_config(case)
  mesh = sharding.make_mesh({"data": 1})
  model = assembly.model(config, case.shape.vocab, mesh)
  optimizer, schedule = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), config.train.steps
  )
  params = variables["params"]
  # The first step gets its state where it will leave it, so that the second one compiles nothing.
  state = jax.device_put(
    TrainState(jax.numpy.int32(0), params, optimizer.init(params), {}, jax.random.key(0)),
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
  )
  batch = evaluate.put(
    mesh,
    {
      "inputs": tokens[:, :-1].astype(np.int32),
      "targets": tokens[:, 1:].astype(np.int32),
      "segment_ids": np.ones((case.rows, case.length), np.int32),
      "positions": np.tile(np.arange(case.length, dtype=np.int32), (case.rows, 1)),
    },
  )
  do = update.make(config, model, optimizer, schedule)

  def step() -> float:
    nonlocal state
    with jax.set_mesh(mesh), sharding.use_rules(dict(config.sharding)):
      state, metrics = do(state, batch)
    # The loss is there before the update is; the time of a step includes both.
    jax.block_until_ready(state)
    return float(metrics["cross_entropy"])

  return step


def our_config(case: Case):
  """Returns the config of our side."""
  config = generation.our_config(case.shape)
  config.model.moe.balance_loss = 0.0
  config.data.seq_len = case.length
  config.train.batch_size = case.rows
  config.optimizer.update(
    dict(name="adamw", learning_rate=RATE, weight_decay=0.1, warmup_steps=0, clip_norm=CLIP)
  )
  return config


def measure(case: Case, rounds: int, progress: Progress) -> dict[str, Any]:
  """Times the sides.

  Args:
    case: The model and its batch.
    rounds: The number of timed rounds; two more come before them.
    progress: The progress bar.

  Returns:
    {"seconds": side -> median, "ratio", "lowest_ratio": the time of the fastest form of
    transformers by ours, as the median and the minimum over rounds, "losses": side -> the first
    step's}.
  """
  tokens = np.random.default_rng(0).integers(1, case.shape.vocab, (case.rows, case.length + 1))
  steps, variables = {}, None
  for name in THEIRS:
    model = generation.theirs(case.shape, name)
    variables = variables or generation.weights(model, case.shape)
    steps[name] = their_step(model, tokens)
  assert variables is not None
  steps["moe_jax"] = our_step(case, variables, tokens)
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  losses: dict[str, float] = {}
  for number in range(rounds + 2):
    for name, step in steps.items():
      progress(f"D={case.shape.d_model}: {name}")
      start = time.perf_counter()
      loss = step()
      if number == 0:
        losses[name] = loss
      # The first round compiles, and allocators settle in the second.
      elif number > 1:
        seconds[name].append(time.perf_counter() - start)
  medians = {name: float(np.median(values)) for name, values in seconds.items()}
  best = min(THEIRS, key=lambda name: medians[name])
  ratios = np.divide(seconds[best], seconds["moe_jax"])
  return {
    "seconds": medians,
    "ratio": float(np.median(ratios)),
    "lowest_ratio": float(np.min(ratios)),
    "losses": losses,
  }


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument(
    "--shapes", default=",".join(CASES), help=f"comma-separated, of {', '.join(CASES)}"
  )
  parser.add_argument(
    "--repeats", type=int, default=9, help="timed rounds; medians are shown (%(default)s)"
  )
  parser.add_argument("--out", type=pathlib.Path, help="JSON file for the results")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  names = options.shapes.split(",")
  for name in names:
    choose("shapes", name, CASES)
  check_counts(options, repeats=1)
  check_folder("out", options.out)
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ConfigError(
      "bench", "train", "needs the extra [reference]; run make bench-train"
    ) from error
  progress = Progress(len(names) * (options.repeats + 2) * (len(THEIRS) + 1))
  versions = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "threads": THREADS,
    "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
  }
  report: dict[str, Any] = {"shapes": {}}
  sides = (*THEIRS, "moe_jax")
  print(f"{'':8}" + "".join(f"{side:>14}" for side in sides) + f"{'ratio':>7}{'lowest':>8}  losses")
  for name in names:
    before = environment() | versions
    result = measure(CASES[name], options.repeats, progress)
    progress.clear()
    spread = max(result["losses"].values()) - min(result["losses"].values())
    print(
      f"{name:8}"
      + "".join(f"{1000 * result['seconds'][side]:>11.0f} ms" for side in sides)
      + f"{result['ratio']:>7.2f}{result['lowest_ratio']:>8.2f}  differ by {spread:.1e}",
      flush=True,
    )
    case = CASES[name]
    report["shapes"][name] = result | {
      "shape": case.shape._asdict() | {"rows": case.rows, "length": case.length},
      "environment": before | {"load_average_after": os.getloadavg()},
      "repeats": options.repeats,
    }
  if options.out:
    options.out.write_text(json.dumps(report, indent=1) + "\n")
  return 0
