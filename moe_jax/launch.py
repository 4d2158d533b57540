"""Train with several processes on this machine: a stand-in for a pod, and the way to try a launch
script's command.

  python -m moe_jax.launch --processes=4 --devices=2 --config=configs/quickstart.py
    --workdir=runs/several [...]

Starts `python -m moe_jax.train` N times, each process with that many CPU devices, and prints what
they say. When one of them dies the others are ended within half a minute and the exit code is 1;
the same command goes on from the last checkpoint, with any number of processes that divides the
batch.
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

MOST = 1024  # processes, and devices of each, on one machine
GRACE_SECONDS = 25.0  # for the others to end by themselves after one has died


def run() -> None:
  """The console entry point."""
  sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""
  return guarded(argv, __doc__, lambda rest: _launch(rest[1:]))


def _launch(args: Sequence[str]) -> int:
  values, passed = take_flags(args, (Flag("processes"), Flag("devices")), passes=True)
  processes, devices = (
    whole(name, values.get(name, default), 1, MOST)
    for name, default in (("processes", "2"), ("devices", "1"))
  )
  parse(["train", *passed])  # so that a mistake is told once, and not by each process
  return supervise(start(processes, devices, passed))


def start(processes: int, devices: int, args: Sequence[str]) -> list[subprocess.Popen]:
  """The processes, which find each other at a free port of this machine; what they print gets their
  number."""
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
  """The command line of each process, with the address of a free port of this machine."""
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
  """Of a process with that many CPU devices."""
  flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "PYTHONUNBUFFERED": "1"}


def supervise(children: Sequence[subprocess.Popen], grace: float = GRACE_SECONDS) -> int:
  """Waits for all to end, and ends the others when one has died; returns the exit code of the
  whole.

  SIGTERM and Ctrl-C are passed on: the run saves at a step that all agree on, and ends.
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
    index, code = next(
      (i, child.poll()) for i, child in enumerate(children) if child.poll() not in (None, 0)
    )
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
  for line in child.stdout:
    print(f"[{index}] {line}", end="", flush=True)


if __name__ == "__main__":
  run()
