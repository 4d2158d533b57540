"""Tests how processes find each other, and what they print if one is lost."""

import subprocess
import sys

import pytest

from moe_jax import distributed, launch, train
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "environ, joins",
  [
    ({}, False),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # a batch script, outside srun
    ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-8]", "SLURM_STEP_NUM_TASKS": "8"}, True),
    (
      {
        "SLURM_PROCID": "0",
        "SLURM_STEP_NODELIST": "n1",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_NTASKS": "8",
      },
      False,
    ),
    ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"MEGASCALE_NUM_SLICES": "2"}, True),
  ],
)
def test_launchers_are_recognised(environ, joins):
  # Catches eight separate runs in one workdir in place of one run of eight processes, and a single
  # process that waits for others.
  assert distributed.several(environ) == joins


@pytest.mark.parametrize(
  "how", ["10.0.0.1", "10.0.0.1:1234", "10.0.0.1:1234,2", "10.0.0.1:x,2,0", "h:1,2,2", "on"]
)
def test_a_wrong_flag_is_one_sentence(how, tmp_path, capfd):
  # Catches a traceback, and minutes of waiting for processes that will never come.
  argv = ["train", "--config=configs/base.py", f"--workdir={tmp_path}/run", f"--distributed={how}"]
  assert train.main(argv) == 2
  assert capfd.readouterr().err.startswith(f"error: distributed={how!r}")


def test_the_flag_is_read():
  # Catches processes that are counted from 1, and a port that is lost.
  assert distributed.explicit("10.0.0.1:1234,4,3") == {
    "coordinator_address": "10.0.0.1:1234",
    "num_processes": 4,
    "process_id": 3,
  }
  with pytest.raises(ConfigError, match="of 4 processes the first has INDEX 0 and the last 3"):
    distributed.explicit("10.0.0.1:1234,4,4")


IDLE = """
import sys, time
from moe_jax import distributed
distributed.HEARTBEAT_SECONDS = 3
distributed.initialize(sys.argv[1].partition("=")[2])
print("joined", flush=True)
time.sleep(100)
"""


@pytest.mark.smoke
def test_a_process_that_waits_for_nobody_notices_too():
  # The survivor is between two exchanges with the other process, as it is while it compiles.
  # Catches a survivor whose last output is the stack trace of the runtime.
  pair = [
    subprocess.Popen(
      [sys.executable, "-c", IDLE, command[-1]],
      env=launch.environment(1),
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for command in launch.commands(2, [])
  ]
  for process in pair:
    while "joined" not in process.stdout.readline():
      assert process.poll() is None
  pair[0].kill()
  for process in pair:
    output, _ = process.communicate(timeout=60)
    assert process.returncode and output.splitlines()[-1] == distributed._LAST_WORDS


def test_who_ends_as_usual_has_no_last_words():
  # Catches a message about a killed process after each run, and after each mistake on the command
  # line.
  program = "from moe_jax import distributed; distributed._leave_last_words(); raise SystemExit({})"
  for code in (0, 2):
    done = subprocess.run(
      [sys.executable, "-c", program.format(code)], capture_output=True, text=True
    )
    assert done.returncode == code and not done.stderr


@pytest.mark.parametrize("text", ["many", "", "2.5", "-1", "9" * 40, "\u00b2"])
def test_an_environment_that_holds_no_number_is_told(text):
  # Catches a traceback of int() for a variable that a scheduler has set to something else.
  with pytest.raises(ConfigError, match="SLURM_NTASKS.*--distributed=off"):
    distributed.several({"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_NTASKS": text})
