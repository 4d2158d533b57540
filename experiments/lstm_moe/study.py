"""The rows of Table 6 of Shazeer et al. 2017, and how evenly a trained model routes."""

from __future__ import annotations

import itertools
import pathlib
import statistics
from typing import Any

import jax
import numpy as np

from experiments.common import sweep
from experiments.common.entry import parse
from moe_jax import assembly, data, sharding
from moe_jax.data.options import DataOptions
from moe_jax.training import checkpoints, metrics

# (w_importance, w_load) -> the paper's test perplexity, CV(Importance), CV(Load), and max(Load) /
# mean(Load).
PAPER = {
  (0.0, 0.0): (39.8, 3.04, 3.01, 17.80),
  (0.2, 0.0): (35.6, 0.06, 0.17, 1.47),
  (0.0, 0.2): (35.7, 0.22, 0.04, 1.15),
  (0.1, 0.1): (35.6, 0.06, 0.05, 1.14),
  (0.01, 0.01): (35.7, 0.48, 0.11, 1.37),
  (1.0, 1.0): (35.7, 0.03, 0.02, 1.07),
}
SEEDS = 3
EXPERTS, STEPS, EVERY = 32, 400, 20
BATCHES = 16  # the number of batches that balance is averaged over


def name(importance: float, load: float, seed: int) -> str:
  """Returns the name of a row."""
  return f"importance_{importance:g}_load_{load:g}_seed{seed}"


def _row(config: str, importance: float, load: float, seed: int, **more: Any) -> sweep.Row:
  return sweep.Row(
    config,
    {"model.moe.importance_loss": importance, "model.moe.load_loss": load, "seed": seed}
    | {key.replace("__", "."): value for key, value in more.items()},
  )


DESK = {
  name(*weights, seed): _row(
    "configs/lstm_moe.py:desk",
    *weights,
    seed,
    model__moe__num_experts=EXPERTS,
    train__steps=STEPS,
    train__log_every=EVERY,
    train__eval_every=STEPS,
    train__checkpoint_every=STEPS,
  )
  for weights, seed in itertools.product(PAPER, range(SEEDS))
}
FULL = {
  f"moe_256_{name(*weights, 0)}": _row("configs/lstm_moe.py:moe_256", *weights, 0)
  for weights in PAPER
}


def balance(row: sweep.Row, directory: pathlib.Path) -> dict[str, Any]:
  """Measures how evenly the last checkpoint of a desk run routes batches that it has not read.

  As in the paper, the batches are those of training, the router's noise is on, Load is the smooth
  estimator (appendix A), and all figures are means over batches. max/mean counts the tokens that
  the experts got.

  Args:
    row: The row of the run.
    directory: The folder of the run.

  Returns:
    "cv_importance", "cv_load", "max_over_mean" and, without noise, "evaluated_max_over_mean", each
    the mean over `BATCHES`; and "curve", the pairs [step, max/mean of its batch] of training.
  """
  config = parse(["", *row.arguments()], workdir=False).config
  with config.unlocked():
    # The model reports only losses whose weight is not 0.
    config.model.moe.importance_loss = config.model.moe.load_loss = 1.0
  data_options = DataOptions.of(config.data)
  tokenizer, sources = data.tokenizer_of(data_options), data.make_sources(data_options)
  model = assembly.model(
    config, data.vocab_size(data_options, tokenizer), sharding.make_mesh({"data": 1})
  )
  saved = directory / "checkpoints"
  params = checkpoints.load_params(saved, checkpoints.steps(saved)[-1])

  @jax.jit
  def measure(batch, key):
    balance = {}
    for noisy in (True, False):
      _, aux = model.apply(
        {"params": params},
        batch["inputs"],
        batch["segment_ids"],
        batch["positions"],
        train=noisy,
        rngs={"router": key},
      )
      balance[noisy] = {**aux.losses, "max_over_mean": 1 + aux.metrics["max_violation"][0]}
    cv = {f"cv_{loss}": balance[True][loss] ** 0.5 for loss in ("importance", "load")}
    return cv | {
      "max_over_mean": balance[True]["max_over_mean"],
      "evaluated_max_over_mean": balance[False]["max_over_mean"],
    }

  batches = data.train_iterator(data_options, tokenizer, sources, config.train.batch_size)
  # The batches after the last one that was trained on.
  batches.set_state({"pipeline": data_options.pipeline, "batches": config.train.steps})
  measured = [measure(next(batches), jax.random.key(i)) for i in range(BATCHES)]
  batches.close()
  lines = [line for line in metrics.read(directory / "metrics.jsonl") if line["kind"] == "train"]
  return {key: float(np.mean([each[key] for each in measured])) for key in measured[0]} | {
    "curve": [[line["step"], 1 + line["moe/max_violation"][0]] for line in lines]
  }


def perplexity(line: dict[str, Any]) -> float:
  """Returns the perplexity of a held-out byte: exp of the nats per byte, averaged over sources."""
  return float(np.exp(statistics.fmean(line["loss"].values())))
