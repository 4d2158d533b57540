"""Checks that the quickstart trains on 2 and 4 processes as on one, also when processes are killed.

  make demo-multiprocess      (= python -m experiments multiprocess run [--workdir=DIR])

It trains `STEPS[0]` steps of configs/quickstart.py with 1, 2 and 4 processes of this machine, goes
on from a checkpoint of the 4 with 1, 2 and 4 processes on other meshes to `STEPS[1]`, and prints
all curves. In between it starts two processes as a cluster would, so that nobody ends one when the
other dies. It kills one with SIGKILL after a checkpoint, says how long the other one lives on and
what it says last, and starts both again. The exit code is 1 if the curves differ by more than
`TOLERANCE`, or if the survivor needs more than `SURVIVES` seconds to end. The curves differ a
little, because sums over more devices are rounded differently and training magnifies that from step
to step.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import time

from experiments.common.study import Study, Verb
from moe_jax import launch
from moe_jax.training import checkpoints, metrics

STEPS = (30, 40)
EVERY = 5  # steps between two points of a curve
TOLERANCE = 1e-3  # of a loss, relatively
SURVIVES = 60  # seconds that a process may live on without the other one
MESHES = {1: "data=1", 2: "data=2", 4: "data=4"}
OTHER_MESHES = {1: "data=1", 2: "expert=2", 4: "fsdp=2,expert=2"}


def train(workdir: pathlib.Path, processes: int, mesh: str, steps: int) -> dict[int, float]:
  """Trains a run and returns its loss curve, step -> loss."""
  command = [
    sys.executable,
    "-m",
    "moe_jax.launch",
    f"--processes={processes}",
    *arguments(workdir, mesh, steps),
  ]
  print(f"{processes} processes, {mesh}, to step {steps}", flush=True)
  with open(f"{workdir}.log", "a") as log:
    if subprocess.run(command, stdout=log, stderr=log).returncode:
      sys.exit(f"error: {workdir}.log says what went wrong")
  return curve(workdir)


def arguments(
  workdir: pathlib.Path, mesh: str, steps: int, checkpoint_every: int = 1000
) -> list[str]:
  """Returns the flags of `python -m moe_jax.train`."""
  axes = dict(axis.split("=") for axis in mesh.split(","))
  sizes = {name: axes.get(name, "1") for name in ("data", "fsdp", "expert", "tensor")}
  return [
    "--config=configs/quickstart.py",
    f"--workdir={workdir}",
    f"--config.train.steps={steps}",
    f"--config.train.log_every={EVERY}",
    "--config.train.eval_every=1000",
    "--config.train.eval_batches=1",
    f"--config.train.checkpoint_every={checkpoint_every}",
    "--config.optimizer.schedule=constant",
    *(f"--config.mesh.{name}={size}" for name, size in sizes.items()),
  ]


def curve(workdir: pathlib.Path) -> dict[int, float]:
  """Returns the loss curve of a run, step -> loss."""
  return {
    line["step"]: line["loss"]
    for line in metrics.read(workdir / "metrics.jsonl")
    if line["kind"] == "train"
  }


def killed(workdir: pathlib.Path) -> dict[int, float]:
  """Returns the loss curve of two processes of which one is killed and then started again."""
  commands = launch.commands(2, arguments(workdir, MESHES[2], STEPS[0], EVERY))
  print(
    f"2 processes, {MESHES[2]}, to step {STEPS[0]}, each by itself: python -m moe_jax.train ... "
    f"{commands[0][-1]}",
    flush=True,
  )
  pair, logs = start(commands, workdir), [pathlib.Path(f"{workdir}.{i}.log") for i in range(2)]
  while not (saved := checkpoints.steps(workdir / "checkpoints")):
    if any(process.poll() is not None for process in pair):
      sys.exit(f"error: {logs[0]} and {logs[1]} say what went wrong")
    time.sleep(0.05)
  pair[1].kill()
  since = time.monotonic()
  try:
    code = pair[0].wait(SURVIVES)
  except subprocess.TimeoutExpired:
    pair[0].kill()
    sys.exit(
      f"error: process 0 goes on {SURVIVES} s after process 1 was killed; {logs[0]} says what it "
      "did"
    )
  took = time.monotonic() - since
  time.sleep(1)  # its last words may not be written yet
  print(
    f"process 1 was killed (SIGKILL) after the checkpoint of step {saved[-1]}; process 0 ended "
    f"{took:.1f} s later with exit code {code} and said last:\n"
    f"  {logs[0].read_text().splitlines()[-1]}",
    flush=True,
  )
  print("the same two commands again", flush=True)
  if any([process.wait() for process in start(commands, workdir)]):
    sys.exit(f"error: {logs[0]} and {logs[1]} say what went wrong")
  print(
    "  " + next(line for line in logs[0].read_text().splitlines() if "going on from step" in line)
  )
  return curve(workdir)


def start(commands: list[list[str]], workdir: pathlib.Path) -> list[subprocess.Popen]:
  """Starts a process for each command, which writes to WORKDIR.INDEX.log."""
  started = []
  for i, command in enumerate(commands):
    with open(f"{workdir}.{i}.log", "a") as log:
      started.append(subprocess.Popen(command, env=launch.environment(1), stdout=log, stderr=log))
  return started


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/multiprocess"))


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  home = options.workdir
  shutil.rmtree(home, ignore_errors=True)
  home.mkdir(parents=True)
  curves = {f"{n}": train(home / f"{n}", n, mesh, STEPS[0]) for n, mesh in MESHES.items()}
  curves["2, one killed, then 2"] = killed(home / "2_killed")
  for n, mesh in OTHER_MESHES.items():
    shutil.copytree(home / "4", home / f"4_then_{n}")
    curves[f"4, then {n} ({mesh})"] = train(home / f"4_then_{n}", n, mesh, STEPS[1])
  curves["1, longer"] = train(home / "1", 1, MESHES[1], STEPS[1])
  print(table(curves))
  worst = max(
    abs(loss / curves["1, longer"][step] - 1)
    for curve in curves.values()
    for step, loss in curve.items()
  )
  print(
    "\n"
    f"largest relative difference from one process: {worst:.1e} (at most {TOLERANCE:g} is allowed)"
  )
  return int(worst > TOLERANCE)


def table(curves: dict[str, dict[int, float]]) -> str:
  """Returns the curves side by side."""
  width = max(map(len, curves))
  steps = sorted({step for curve in curves.values() for step in curve})
  lines = [f"{'processes':<{width}}" + "".join(f"{f'step {step}':>10}" for step in steps)]
  lines += [
    f"{name:<{width}}"
    + "".join(f"{curve[step]:>10.5f}" if step in curve else f"{'':>10}" for step in steps)
    for name, curve in curves.items()
  ]
  return "\n".join(lines)


STUDY = Study(
  name="multiprocess",
  about="Does the quickstart train on 2 and 4 processes as on one, also when one is killed?",
  verbs={"run": Verb("Trains all runs and compares their curves: some minutes.", flags, action)},
)
