"""Table 6 of Shazeer et al. 2017 at a desk; README.md beside this file has question and outcome.

python -m experiments.lstm_moe --desk    trains what is not finished, measures its balance, renews
tables and figure python -m experiments.lstm_moe --print   prints the commands of the paper's size
(experiments/common/sweep.py has the flags) python -m experiments.lstm_moe --write   renews tables and
figure from results.jsonl and balance.jsonl alone
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import sys

from absl import logging
from tqdm import tqdm

from experiments.common import sweep
from experiments.lstm_moe import study, table
from moe_jax.errors import ConfigError
from moe_jax.train import guarded

HERE = table.README.parent


def main(argv: list[str]) -> int:
  """Does what the command line says; returns the exit code."""
  if argv == ["--write"]:
    table.write()
    return 0
  if "--desk" not in argv:
    return sweep.main(argv, study.FULL, HERE)
  argv = [arg for arg in argv if arg != "--desk"]
  # Seeds differ in no program.
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_workdir(argv).absolute() / "compiled"))
  code = sweep.main(argv, study.DESK, HERE)
  if code or "--print" in argv:
    return code
  try:
    _measure(_workdir(argv))
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  table.write()
  return 0


def _workdir(argv: list[str]) -> pathlib.Path:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs") / HERE.name)
  return parser.parse_known_args(argv)[0].workdir


def _measure(runs: pathlib.Path) -> None:
  """Adds the balance of each finished run that has none yet to balance.jsonl.

  Raises:
    ConfigError: such a run's folder is gone.
  """
  logging.set_verbosity(logging.ERROR)  # Orbax warns of what is as it should be
  known = sweep.load(table.BALANCE)
  finished = [name for name in study.DESK if name in sweep.load(table.RESULTS)]
  for name in tqdm([name for name in finished if name not in known], unit="run"):
    if not (runs / name / "checkpoints").is_dir():
      raise ConfigError(
        "workdir",
        str(runs / name),
        f"is gone, and with it what its router does; remove the line of "
        f"{name} from {table.RESULTS} to train it again",
      )
    date = datetime.date.today().isoformat()
    sweep.append(
      table.BALANCE, {"row": name, "date": date} | study.balance(study.DESK[name], runs / name)
    )


if __name__ == "__main__":
  sys.exit(guarded(sys.argv, None, lambda argv: main(argv[1:])))
