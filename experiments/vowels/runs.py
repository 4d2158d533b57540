"""Trains all models under all conditions, and writes results.json and the figures."""

from __future__ import annotations

import concurrent.futures
import json
import os
import platform
import time

import jax
from tqdm import tqdm

from experiments.common import plots
from experiments.vowels import data, figures, study, table

HERE = table.README.parent


def train() -> None:
  """Runs the whole study and writes results.json and the figures."""
  start = time.perf_counter()
  cases = data.load()
  plots.pyplot()  # a missing library is told now, not after the training
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # a row keeps one core busy
    asked = {
      name: {
        model: pool.submit(study.run, cases, condition, model, study.error_of(model))
        for model in study.MODELS
      }
      for name, condition in study.CONDITIONS.items()
    }
    others = {
      error: pool.submit(study.run, cases, study.Condition(), "4 experts", error)
      for error in study.ERRORS
      if error != "competitive"
    }
    trained = {name: {} for name in asked}
    for name, model in tqdm(
      [(name, model) for name, models in asked.items() for model in models], unit="row"
    ):
      trained[name][model] = asked[name][model].result()
    errors = {
      error: others[error].result() if error in others else trained["pairs"]["4 experts"]
      for error in study.ERRORS
    }
  figures.lines(data.split(cases, "file")[0], errors, HERE / "lines.png")
  figures.curves({name: trained[name] for name in study.DRAWN}, HERE / "curves.png")
  results = {
    "criterion": study.CRITERION,
    "step_sizes": study.STEP_SIZES,
    "max_epochs": study.MAX_EPOCHS,
    "in_use": study.IN_USE,
    "dropped_speaker": data.DROPPED,
    "errors": {error: one.row for error, one in errors.items()},
    "conditions": {
      name: {model: one.row for model, one in models.items()} for name, models in trained.items()
    },
    "seconds": time.perf_counter() - start,
    "cpu_seconds": time.process_time(),
    "hardware": f"{os.cpu_count()} {platform.machine()} CPUs",
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
  }
  (HERE / "results.json").write_text(
    "{\n"
    + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results.items())
    + "\n}\n"
  )
