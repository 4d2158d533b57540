"""Tests that several processes train like one, and that none outlives another."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny

from moe_jax import launch, train
from moe_jax.training import metrics

pytestmark = pytest.mark.smoke
ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_a_mistake_is_told_once_and_not_by_each_process(tmp_path, capfd):
  # Catches N copies of the same error.
  argv = [
    "launch",
    "--processes=3",
    "--config=configs/base.py",
    f"--workdir={tmp_path}/run",
    "--config.seeed=3",
  ]
  assert launch.main(argv) == 2
  assert capfd.readouterr().err.count("error:") == 1
  assert launch.main(["launch", "--processes=none"]) == 2
  assert "processes='none'" in capfd.readouterr().err


def children(*programs):
  """Starts a process for each Python program."""
  return [subprocess.Popen([sys.executable, "-c", program]) for program in programs]


def test_when_one_process_dies_the_others_end(capfd):
  # Catches processes that wait for ever for one that is gone, and the exit code 0.
  die = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
  started = time.monotonic()
  assert launch.supervise(children("import time; time.sleep(60)", die), grace=0.5) == 1
  assert time.monotonic() - started < 30
  assert "process 1 of 2 was ended by SIGKILL" in capfd.readouterr().err
  assert launch.supervise(children("pass", "pass")) == 0
  assert (
    launch.supervise(children("import time; time.sleep(60)", "raise SystemExit(2)"), grace=0.0) == 2
  )


def command(tmp_path, name, *extra):
  """Returns the arguments of a tiny run in the workdir `name`, without the mesh."""
  flags = [
    flag
    for flag in tiny.flags(tmp_path, train__steps=4, train__eval_every=4)
    if "mesh.data" not in flag
  ]
  return [f"--workdir={tmp_path / name}", "--config=configs/base.py", *flags, *extra]


def losses(tmp_path, name):
  """Returns step -> training loss of the run in the workdir `name`."""
  return {
    line["step"]: line["loss"]
    for line in metrics.read(tmp_path / name / "metrics.jsonl")
    if line["kind"] == "train"
  }


def test_two_processes_train_like_one_and_one_goes_on_with_their_checkpoint(tmp_path):
  # Catches rows that are read twice or not at all, values that differ between processes, a
  # checkpoint that only the same number of processes can read, and a run of several processes that
  # never ends.
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "moe_jax.launch",
      "--processes=2",
      *command(tmp_path, "run", "--config.train.steps=2", "--config.optimizer.schedule=constant"),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert done.returncode == 0 and "[0] report: " in done.stdout, done.stdout + done.stderr
  # The second process prints nothing, except for messages of Gloo.
  assert not re.search(r"\[1\] (?!\[Gloo)", done.stdout)
  constant = "--config.optimizer.schedule=constant"
  assert train.main(["train", *command(tmp_path, "run", constant), "--config.mesh.data=1"]) == 0
  assert train.main(["train", *command(tmp_path, "whole", constant), "--config.mesh.data=1"]) == 0
  one, two = losses(tmp_path, "whole"), losses(tmp_path, "run")
  assert list(one) == [2, 4] and two == pytest.approx(one, rel=1e-5)


def wait_for(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


def saved(tmp_path):
  """Returns the step of the latest checkpoint, or 0 if there is none."""
  return max(
    (int(path.name) for path in tmp_path.glob("run/checkpoints/*") if path.name.isdigit()),
    default=0,
  )


def test_one_of_two_is_killed_and_of_the_next_two_one_is_told_to_stop(tmp_path, capfd):
  # The processes are not supervised, as on a cluster.
  # Catches a survivor that hangs or prints nothing but the stack trace of the runtime, a restart
  # that begins anew, and two processes that stop at different steps or report that they were
  # killed.
  outputs = []

  def printed(words):
    outputs.append(capfd.readouterr().out)
    return words in "".join(outputs)

  args = command(
    tmp_path,
    "run",
    "--config.train.steps=100000",
    "--config.train.checkpoint_every=20",
    "--config.train.eval_every=100000",
    "--config.train.log_every=1000",
  )
  first = launch.start(2, 1, args)
  wait_for(lambda: saved(tmp_path))
  first[1].kill()
  assert first[0].wait(60) not in (None, 0)
  wait_for(
    lambda: printed(
      "[0] error: this process was killed, or ended because another one is gone; the same command"
    )
  )
  step = saved(tmp_path)
  second = launch.start(2, 1, args)
  wait_for(lambda: saved(tmp_path) > step)
  second[1].send_signal(signal.SIGTERM)
  assert [child.wait(60) for child in second] == [0, 0]
  wait_for(lambda: printed(f"stopped by preemption after step {saved(tmp_path)} of"))
  # Only the first two processes have printed errors.
  assert "".join(outputs).count("error: ") == 2
  # The last checkpoint is not one of those that are saved every 20 steps.
  assert printed(f"going on from step {step}") and saved(tmp_path) % 20


@pytest.mark.every_variant
def test_a_process_that_is_killed_ends_the_others_and_all_go_on(tmp_path):
  # Catches survivors that hang, and a restart that cannot resume.
  argv = [
    sys.executable,
    "-m",
    "moe_jax.launch",
    "--processes=2",
    *command(tmp_path, "run", "--config.train.steps=3000", "--config.train.checkpoint_every=50"),
  ]
  run = subprocess.Popen(
    argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  for line in run.stdout:
    if line.startswith("[0] step 200/"):
      break
  workers = subprocess.run(
    ["pgrep", "-f", f"moe_jax.train.*{tmp_path}"], capture_output=True, text=True
  ).stdout.split()
  os.kill(int(workers[-1]), signal.SIGKILL)
  killed = time.monotonic()
  rest = run.stdout.read()
  assert run.wait(90) == 1 and time.monotonic() - killed < 60, rest
  assert "the same command" in rest
  done = subprocess.run(
    [*argv, "--config.train.steps=400"], cwd=ROOT, capture_output=True, text=True, timeout=500
  )
  assert done.returncode == 0 and "going on from step" in done.stdout, done.stdout + done.stderr
