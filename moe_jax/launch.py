"""Trains with several processes on this machine, as on a pod.

This is also a way to try the command of a launch script.

  python -m moe_jax.launch --processes=4 --devices=2 --config=configs/quickstart.py
    --workdir=runs/several [...]

It starts as many processes of `python -m moe_jax.train` as --processes says, each with --devices
CPU devices, and prints their output. If one of them dies, the others are ended within half a minute
and the exit code is 1. The same command then resumes from the last checkpoint, with any number of
processes that divides the batch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from moe_jax.commands import Flag, guarded, parse, take_flags
from moe_jax.errors import whole

MOST = 1024  # maximum number of processes, and of devices per process
GRACE_SECONDS = 25.0  # time that the others have to end by themselves after one has died


def main(argv: Sequence[str]) -> int:
  """Runs the command line and returns the exit code.

  Args:
    argv: The command line, beginning with the program's name.
  """
  return guarded(argv, __doc__, lambda rest: _launch(rest[1:]))


def _launch(args: Sequence[str]) -> int:
  """Checks the arguments of the command, starts the processes and waits for them."""
  values, passed = take_flags(args, (Flag("processes"), Flag("devices")), passes=True)
  processes, devices = (
    whole(name, values.get(name, default), 1, MOST)
    for name, default in (("processes", "2"), ("devices", "1"))
  )
  # Checks the arguments here, so that a mistake is reported once and not by each process.
  parse(["train", *passed])
  return supervise(start(processes, devices, passed))


def start(processes: int, devices: int, args: Sequence[str]) -> list[subprocess.Popen]:
  """Starts the processes, which find each other at a free port of this machine.

  Their output is printed, each line with the index of its process.

  Args:
    processes: The number of processes.
    devices: The number of CPU devices of each process.
    args: The arguments of `moe_jax.train`.
  """
  children = []
  for index, command in enumerate(commands(processes, args)):
    child = subprocess.Popen(
      command,
      env=environment(devices),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
    )
    threading.Thread(target=_echo, args=(index, child), daemon=True).start()
    children.append(child)
  return children


def commands(processes: int, args: Sequence[str]) -> list[list[str]]:
  """Returns the command line of each process, with the address of a free port of this machine."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
    [
      sys.executable,
      "-m",
      "moe_jax.train",
      *args,
      f"--distributed=127.0.0.1:{port},{processes},{index}",
    ]
    for index in range(processes)
  ]


def environment(devices: int) -> dict[str, str]:
  """Returns the environment variables of a process with `devices` CPU devices."""
  flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "PYTHONUNBUFFERED": "1"}


def supervise(children: Sequence[subprocess.Popen], grace: float = GRACE_SECONDS) -> int:
  """Waits until all processes have ended, and ends the others if one has died.

  SIGTERM and Ctrl-C are passed on as SIGTERM. The run then saves at a step that all processes agree
  on, and ends.

  Args:
    children: The processes.
    grace: The number of seconds that the others have to end by themselves after one has died.

  Returns:
    0 if all processes ended with 0. Otherwise the exit code of the first process that did not, or 1
    if a signal ended it.
  """

  def pass_on(number, frame):
    del frame
    for child in children:
      if child.poll() is None:
        child.send_signal(signal.SIGTERM)

  before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    while all(child.poll() in (None, 0) for child in children):
      if all(child.poll() == 0 for child in children):
        return 0
      time.sleep(0.1)
    # The process that has failed, which is the one whose exit code is neither None nor 0.
    index, code = next((i, status) for i, child in enumerate(children) if (status := child.poll()))
    end = time.monotonic() + grace
    while time.monotonic() < end and any(child.poll() is None for child in children):
      time.sleep(0.1)
    for child in children:
      child.kill()
      child.wait()
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if code > 0:
    return code
  print(
    f"error: process {index} of {len(children)} was ended by {signal.Signals(-code).name}, and "
    "the others with it; the same command goes on from the last checkpoint",
    file=sys.stderr,
    flush=True,
  )
  return 1


def _echo(index: int, child: subprocess.Popen) -> None:
  """Prints the lines that a process writes, each with the index of the process."""
  for line in child.stdout or ():
    print(f"[{index}] {line}", end="", flush=True)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
