"""Makes a workdir whose weights come from another model: the first step of a run that goes on.

  python -m moe_jax surgery upcycle RUN WORKDIR --config.model.moe.num_experts=8 ... [--drop=0.5]
  python -m moe_jax surgery partition RUN WORKDIR --method=NAME --config.model.moe.d_ff=96 ...
  python -m moe_jax surgery expand RUN WORKDIR --config.model.moe.num_experts=16 [--source=fresh]
  python -m moe_jax surgery inherit RUN WORKDIR --config.model.moe.num_experts=0

RUN is the workdir of a run, or of imported weights. WORKDIR must not exist, or be empty. The new
model has the config of RUN with the changes of --config.KEY=VALUE, and --config.model.moe=PRESET
takes a paper's routing. Training goes on from WORKDIR; its optimizer begins anew:

  python -m moe_jax train --config=WORKDIR/config.py --workdir=WORKDIR

upcycle    The dense FFNs of RUN become experts. --drop=SHARE draws this share of each expert's
           hidden units anew.
partition  The hidden units of each FFN are divided among experts (LLaMA-MoE). --method is random,
           clustering, inner or inter; the last two read --rows=N rows of text (512).
expand     Layers with experts get more of them (Lifelong-MoE). --source=copy (the default) begins
           with copies of old experts, --source=fresh with new ones. To freeze the old ones, train
           on with --config.optimizer.freeze_experts=N.
inherit    A model with other FFNs, such as a dense student, takes over all other weights. Train on
           with --config.train.teacher.workdir=RUN to learn from the predictions of RUN.

--step=N takes the checkpoint of step N of RUN in place of the newest. --seed=N is the seed of what
is drawn anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.commands import Flag, guarded, parse, take_flags
from moe_jax.commands.config_file import expand as expand_path
from moe_jax.commands.flags import positional
from moe_jax.errors import ConfigError, choose, whole

FLAGS = tuple(map(Flag, ("drop", "method", "rows", "source", "step", "seed")))
# Operation -> the flags that only it has.
OPERATIONS = {
  "upcycle": {"drop"},
  "partition": {"method", "rows"},
  "expand": {"source"},
  "inherit": set(),
}


def main(argv: Sequence[str]) -> int:
  """Makes the workdir, prints how to go on, and returns the exit code."""
  return guarded(argv, __doc__, lambda rest: _operate(rest[1:]))


def _operate(args: Sequence[str]) -> int:
  """Does what the arguments say."""
  values, rest = take_flags(args, FLAGS)
  changes = [arg for arg in rest if arg.startswith("-")]
  operation, source, destination = positional(
    [arg for arg in rest if not arg.startswith("-")], ["OPERATION", "RUN", "WORKDIR"]
  )
  choose("OPERATION", operation, OPERATIONS)
  for name in values.keys() - OPERATIONS[operation] - {"step", "seed"}:
    (owner,) = (other for other, flags in OPERATIONS.items() if name in flags)
    raise ConfigError(name, values[name], f"is a flag of `surgery {owner}`; leave it out")
  seed = whole("seed", values.get("seed", "0"), 0, 2**32 - 1)
  step = whole("step", values["step"], 0, 2**31 - 1) if "step" in values else None
  run_folder = expand_path("RUN", source)
  command = parse(["surgery", f"--config={run_folder}", *changes], workdir=False)
  from absl import logging

  from moe_jax.surgery import workdir

  # Orbax warns about what its checkpoints do not need.
  logging.set_verbosity(logging.FATAL)
  place = expand_path("WORKDIR", destination)
  workdir.make(run_folder, place, command.config, _function(operation, values, seed), step, seed)
  print(
    f"{run_folder} -> {place}; train on with python -m moe_jax train "
    f"--config={place / 'config.py'} --workdir={place}"
  )
  return 0


def _function(operation: str, values: dict[str, str], seed: int) -> Callable[..., Any]:
  """Returns the operation as a function (run, old weights, new weights, config) -> weights."""
  from moe_jax import surgery
  from moe_jax.surgery.expand import SOURCES
  from moe_jax.surgery.partition import METHODS

  if operation == "upcycle":
    drop = _share("drop", values.get("drop", "0"))
    return lambda run, old, new, config: surgery.upcycle(old, new, drop=drop, seed=seed)
  if operation == "inherit":
    return lambda run, old, new, config: surgery.inherit(old, new)
  if operation == "expand":
    source = choose("source", values.get("source", "copy"), SOURCES)
    return lambda run, old, new, config: surgery.expand(old, new, source=source, seed=seed)
  method = choose("method", values.get("method", ""), METHODS)
  rows = whole("rows", values.get("rows", "512"), 8, 2**20)

  def divide(run, old, new, config):
    found = None
    if method in ("inner", "inter"):
      from moe_jax.surgery.importance import importance

      found = importance(run, config.model.moe.num_experts, rows, seed)
    return surgery.partition(old, new, method=method, importance=found, seed=seed)

  return divide


def _share(field: str, text: str) -> float:
  """Parses a number in [0, 1)."""
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 <= value < 1:
    raise ConfigError(field, text, "must be a number, at least 0 and below 1")
  return value


if __name__ == "__main__":
  sys.exit(main(sys.argv))
