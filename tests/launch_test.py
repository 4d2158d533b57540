"""Several processes on this machine: they train like one, and do not outlive each other."""

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
  # Catches: N copies of the same error.
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
  return [subprocess.Popen([sys.executable, "-c", program]) for program in programs]


def test_when_one_process_dies_the_others_end(capfd):
  # Catches: processes that wait for ever for one that is gone, an exit code of 0.
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
  flags = [
    flag
    for flag in tiny.flags(tmp_path, train__steps=4, train__eval_every=4)
    if "mesh.data" not in flag
  ]
  return [f"--workdir={tmp_path / name}", "--config=configs/base.py", *flags, *extra]


def losses(tmp_path, name):
  return {
    line["step"]: line["loss"]
    for line in metrics.read(tmp_path / name / "metrics.jsonl")
    if line["kind"] == "train"
  }


def test_two_processes_train_like_one_and_one_goes_on_with_their_checkpoint(tmp_path):
  # Catches: rows read twice or by nobody, values that differ between processes, a checkpoint that
  # only as many processes can read, a run that only ends where there is one.
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
  assert not re.search(r"\[1\] (?!\[Gloo)", done.stdout)  # the second is silent
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
  return max(
    (int(path.name) for path in tmp_path.glob("run/checkpoints/*") if path.name.isdigit()),
    default=0,
  )


def test_one_of_two_is_killed_and_of_the_next_two_one_is_told_to_stop(tmp_path, capfd):
  # Nobody ends the others, as on a cluster. Catches: a survivor that hangs, or ends with nothing
  # but the runtime's trace; a restart that begins anew; two that stop at different steps, or say
  # that they were killed.
  said = []

  def heard(words):
    said.append(capfd.readouterr().out)
    return words in "".join(said)

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
    lambda: heard(
      "[0] error: this process was killed, or ended because another one is gone; the same command"
    )
  )
  step = saved(tmp_path)
  second = launch.start(2, 1, args)
  wait_for(lambda: saved(tmp_path) > step)
  second[1].send_signal(signal.SIGTERM)
  assert [child.wait(60) for child in second] == [0, 0]
  wait_for(lambda: heard(f"stopped by preemption after step {saved(tmp_path)} of"))
  assert "".join(said).count("error: ") == 2  # of the first two
  assert (
    heard(f"going on from step {step}") and saved(tmp_path) % 20
  )  # no checkpoint that was due anyway


@pytest.mark.every_variant
def test_a_process_that_is_killed_ends_the_others_and_all_go_on(tmp_path):
  # Catches: survivors that hang, and a restart that cannot go on.
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
  seen = []
  for line in run.stdout:
    seen.append(line)
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
