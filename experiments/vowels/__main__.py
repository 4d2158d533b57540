"""Table 1 of "Adaptive Mixtures of Local Experts" on Peterson and Barney's vowels; README.md has
question and outcome.

python -m experiments.vowels           trains all, and renews results.json, the figures and the
README's tables python -m experiments.vowels --write   renews the README's tables from results.json
alone
"""

import concurrent.futures
import json
import os
import platform
import sys
import time

import jax
from tqdm import tqdm

from experiments.vowels import data, figures, study, table
from moe_jax.errors import ConfigError
from moe_jax.routers import replace
from moe_jax.train import guarded

HERE = table.README.parent


def main(argv: list[str]) -> int:
  """Does what the command line says; returns the exit code."""
  try:
    if argv not in ([], ["--write"]):
      raise ConfigError("experiments.vowels", " ".join(argv), "the only flag is --write")
    if not argv:
      train()
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  results = json.loads((HERE / "results.json").read_text())
  table.README.write_text(replace(table.README.read_text(), "vowels", table.table(results)))
  return 0


def train() -> None:
  """Runs the study; writes results.json and the figures."""
  start = time.perf_counter()
  cases = data.load()
  data.need("matplotlib")  # said now, not after the training
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
    found = {name: {} for name in asked}
    for name, model in tqdm(
      [(name, model) for name, models in asked.items() for model in models], unit="row"
    ):
      found[name][model] = asked[name][model].result()
    errors = {
      error: others[error].result() if error in others else found["pairs"]["4 experts"]
      for error in study.ERRORS
    }
  figures.lines(data.split(cases, "file")[0], errors, HERE / "lines.png")
  figures.curves({name: found[name] for name in study.DRAWN}, HERE / "curves.png")
  results = {
    "criterion": study.CRITERION,
    "step_sizes": study.STEP_SIZES,
    "max_epochs": study.MAX_EPOCHS,
    "in_use": study.IN_USE,
    "dropped_speaker": data.DROPPED,
    "errors": {error: one.row for error, one in errors.items()},
    "conditions": {
      name: {model: one.row for model, one in models.items()} for name, models in found.items()
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


if __name__ == "__main__":
  sys.exit(guarded(sys.argv, None, lambda argv: main(argv[1:])))
