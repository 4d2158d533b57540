"""Trains a model on one distribution of text after the other.

  python -m experiments.lifelong.schedule --workdir=DIR --method=NAME --steps=N --seeds=N
    [--set KEY=VALUE ...]

--method is a key of `METHODS`. Seeds 0 to N-1 go through all phases one after another, each in
DIR/seed_S/PHASE. The first phase, which most methods share, is in the folder base beside DIR and is
trained only if it is not there. N steps are those of one phase. --set changes keys of the config of
every phase. The same command goes on after a kill. DIR/results.json has the held-out bits per byte
of each seed on all distributions after each phase. Exit codes are those of `moe_jax.train`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.command_line import Parser
from experiments.common.entry import guarded, keep_memory
from experiments.common.sweep import Row
from moe_jax.errors import ConfigError, choose, whole

# In this order; the paper's are English, other languages, and dialogue.
DOMAINS = ("embedded:prose", "embedded:code", "embedded:tables")
PHASES = ("a", "b", "c")
STEPS, SEEDS = 250, 3
CONFIG, DENSE = "configs/lifelong_moe.py:desk", "configs/dense_baseline.py:lifelong_moe"
# What all phases change in the configs.
KEYS = {
  "data.sources": DOMAINS,
  "train.final_eval_batches": 20,
  "train.eval_batches": 1,
  "report.compare": "",
}
BASE = "base"


@dataclasses.dataclass(frozen=True)
class Method:
  """How a model goes on to new text.

  Attributes:
    about: What the table calls it.
    sequence: Whether the distributions come one after another; else all are mixed from the start.
    added: The number of experts that each layer gets before each new distribution.
    frozen: Whether the old experts and their columns of the router stay as they are.
    teacher: The weight of the divergence from the model of before.
    anchor: The weight of the squared distance from the weights of before.
    replay: The share of old text, in equal parts of all earlier distributions.
  """

  about: str
  sequence: bool = True
  added: int = 0
  frozen: bool = False
  teacher: float = 0.0
  anchor: float = 0.0
  replay: float = 0.0


METHODS = {
  BASE: Method("the first distribution alone"),
  "finetune": Method("plain fine-tuning"),
  "replay": Method("fine-tuning with a quarter of old text", replay=0.25),
  "l2": Method("fine-tuning with online L2", anchor=0.01),
  "expand": Method("more experts, old ones frozen", added=4, frozen=True),
  "lifelong": Method("Lifelong-MoE: and the outputs kept", added=4, frozen=True, teacher=1.0),
  "oracle": Method("dense, all text mixed", sequence=False),
}


@dataclasses.dataclass(frozen=True)
class Phase:
  """A run of a schedule.

  Attributes:
    name: One of `PHASES`; the only phase of a method that mixes all text has the last name.
    folder: Its workdir.
    row: Its config.
    source: The workdir of the run whose weights it begins with; None means freshly drawn ones.
  """

  name: str
  folder: pathlib.Path
  row: Row
  source: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A row of the study, with the methods of `sweep.Row`.

  Attributes:
    method: A key of `METHODS`.
    steps: The number of steps of each phase.
    seeds: The number of seeds.
    overrides: Dotted config key -> value, for every phase.
  """

  method: str
  steps: int = STEPS
  seeds: int = SEEDS
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  program = ("-m", "experiments.lifelong.schedule")

  def arguments(self) -> list[str]:
    """Returns the flags of the program without --workdir. Equal flags mean the same runs."""
    return [
      f"--method={self.method}",
      f"--steps={self.steps}",
      f"--seeds={self.seeds}",
      *(f"--set={key}={value}" for key, value in self.overrides.items()),
    ]

  def command(self, directory: pathlib.Path) -> list[str]:
    """Returns the whole command that trains the schedule in `directory`."""
    return ["python", *self.program, f"--workdir={directory}", *self.arguments()]

  def changed(self, values: Mapping[str, str], seeds: int | None, router: str = "") -> Schedule:
    """Returns the schedule with other values of config keys, or another number of seeds.

    Raises:
      ConfigError: A router is given, or a key that the phases of a schedule differ in.
    """
    if router:
      raise ConfigError("router", router, "experts are added to linear gates; leave the flag out")
    for key in values:
      if key in ("seed", "train.steps", "data.sources", "data.weights"):
        raise ConfigError("set", key, "is what phases differ in; use --seeds or --steps, or leave")
    return dataclasses.replace(
      self, overrides={**self.overrides, **values}, seeds=self.seeds if seeds is None else seeds
    )

  def shortened(self, steps: int) -> Schedule:
    """Returns the schedule with another number of steps of each phase."""
    return dataclasses.replace(self, steps=steps)

  def check(self) -> None:
    """Reads and checks the configs of all phases.

    Raises:
      ConfigError: A key does not exist, or a value is not valid.
    """
    from moe_jax import assembly  # here, because most commands of studies need no JAX

    for phase in self.phases(pathlib.Path(self.method), 0):
      assembly.validate(phase.row.read(), 1)

  def phases(self, directory: pathlib.Path, seed: int) -> list[Phase]:
    """Returns the runs of one seed in their order.

    Args:
      directory: The folder of the schedule, beside which the folder `BASE` lies.
      seed: The seed of the weights and of the noise in training. The order of the text is that of
        `data.seed`.
    """
    method, folder = METHODS[self.method], directory / f"seed_{seed}"
    if not method.sequence:
      keys = self._keys(seed, (1.0, 1.0, 1.0), len(PHASES) * self.steps)
      return [Phase(PHASES[-1], folder / "all", Row(DENSE, keys))]
    keys = self._keys(seed, (1.0, 0.0, 0.0), self.steps)
    found = [Phase(PHASES[0], directory.parent / BASE / f"seed_{seed}" / "a", Row(CONFIG, keys))]
    if self.method == BASE:
      return found
    experts = found[0].row.read().model.moe.num_experts
    for i in (1, 2):
      shares = [method.replay / i] * i + [1 - method.replay] + [0.0] * (2 - i)
      keys, before = self._keys(seed, shares, self.steps), found[-1].folder
      if method.frozen:
        keys["optimizer.freeze_experts"] = experts
      if method.teacher:
        keys["train.teacher.workdir"] = str(before)
        keys["train.teacher.hard_weight"] = 1.0
        keys["train.teacher.soft_weight"] = method.teacher
      if method.anchor:
        keys["optimizer.anchor_weight"] = method.anchor
      experts += method.added
      keys["model.moe.num_experts"] = experts
      found.append(Phase(PHASES[i], folder / PHASES[i], Row(CONFIG, keys), before))
    return found

  def _keys(self, seed: int, shares: Sequence[float], steps: int) -> dict[str, Any]:
    """Returns the config keys of a phase, of which the user's own come last."""
    # GLaM's capacity would leave an old expert fewer slots, the more experts there are.
    return {
      **KEYS,
      **({"model.moe.capacity_factor": None} if METHODS[self.method].sequence else {}),
      "seed": seed,
      "data.weights": tuple(float(share) for share in shares),
      "train.steps": steps,
      "optimizer.warmup_steps": max(steps // 16, 1),
      "train.eval_every": steps,
      "train.checkpoint_every": max(steps // 2, 1),
      **self.overrides,
    }


def run(schedule: Schedule, directory: pathlib.Path) -> int:
  """Trains what is missing of a schedule, and writes its results; returns the exit code."""
  done: dict[str, list[dict[str, Any]]] = {}
  for seed in range(schedule.seeds):
    for phase in schedule.phases(directory, seed):
      print(f"seed {seed}, phase {phase.name}: {phase.folder}", flush=True)
      code = _train(phase, seed)
      file = phase.folder / "results.json"
      # A run that a signal has stopped ends with 0, too, and has no results yet.
      if code or not file.exists():
        return code
      done.setdefault(phase.name, []).append(json.loads(file.read_text()))
  directory.mkdir(parents=True, exist_ok=True)
  partial = directory / "results.partial"
  partial.write_text(json.dumps(summary(done)))
  partial.replace(directory / "results.json")
  return 0


def _train(phase: Phase, seed: int) -> int:
  """Trains one phase, or goes on with it, and returns the exit code of `moe_jax.train`."""
  from moe_jax import train  # here, so that --help and mistakes in flags need no JAX

  # Another run's weights appear at once, with the config of the run that begins with them.
  if phase.source is not None and not (phase.folder / "config.json").exists():
    begin(phase, seed)
  return train.main(["moe_jax.train", f"--workdir={phase.folder}", *phase.row.arguments()])


def begin(phase: Phase, seed: int) -> None:
  """Makes the workdir of a phase from the weights of the phase before.

  If it has more experts than that, the new experts are copies of old ones, which the seed draws.
  """
  from absl import logging

  from moe_jax.surgery import expand, workdir

  # Orbax warns about what its checkpoints do not need.
  logging.set_verbosity(logging.FATAL)

  def operation(run, old, new, config):
    more = config.model.moe.num_experts > run.config.model.moe.num_experts
    return expand(old, new, seed=seed) if more else old

  assert phase.source is not None
  phase.folder.parent.mkdir(parents=True, exist_ok=True)
  workdir.make(phase.source, phase.folder, phase.row.read(), operation, seed=seed)


def summary(done: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
  """Returns the results of a schedule.

  `phases` has for each phase and seed the bits per byte of each distribution, and
  `mean_bits_per_byte` for each seed the mean over all distributions after the last phase.

  Args:
    done: Phase -> the results of its run for each seed.
  """
  last = list(done.values())[-1]
  final = last[-1]
  same = ("parameters", "flops_per_token", "data", "hardware", "versions", "python", "date")
  return {
    "seeds": len(last),
    "steps": sum(of_phase[-1]["steps"] for of_phase in done.values()),
    "tokens": sum(of_phase[-1]["tokens"] for of_phase in done.values()),
    "mean_bits_per_byte": [statistics.fmean(one["bits_per_byte"].values()) for one in last],
    "phases": {name: [one["bits_per_byte"] for one in of_phase] for name, of_phase in done.items()},
    "bigram": {source: rungs["bigram"] for source, rungs in final["ladder"].items()},
    "wall_seconds": sum(one["wall_seconds"] for of_phase in done.values() for one in of_phase),
  } | {key: final[key] for key in same if key in final}


def main(argv: Sequence[str]) -> int:
  """Does what the command line says and returns the exit code."""
  keep_memory()
  return guarded(argv, __doc__, lambda rest: _main(rest[1:]))


def _main(args: Sequence[str]) -> int:
  parser = Parser(prog="python -m experiments.lifelong.schedule", add_help=False)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--method", required=True)
  parser.add_argument("--steps", default=str(STEPS))
  parser.add_argument("--seeds", default=str(SEEDS))
  parser.add_argument("--set", action="append", default=[])
  flags = parser.read(args)
  values = {}
  for text in flags.set:
    key, equals, value = text.partition("=")
    if not equals:
      raise ConfigError("set", text, "must be KEY=VALUE, as in --set=data.seq_len=64")
    values[key] = value
  choose("method", flags.method, METHODS)
  schedule = Schedule(
    flags.method,
    whole("steps", flags.steps, high=10**9),
    whole("seeds", flags.seeds, high=1000),
    values,
  )
  return run(schedule, flags.workdir)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
