"""Several processes that train one model: JAX's multi-controller runtime, joined before anything
else asks for devices.

Every process runs the same command. Under SLURM (`srun`), Open MPI (`mpirun`) and on TPU slices
with a list of hosts in the environment they find each other; elsewhere
`--distributed=HOST:PORT,PROCESSES,INDEX` says it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

from moe_jax.errors import ConfigError

DETECT = "detect"  # the flag's default: join where the environment tells of several processes
HEARTBEAT_SECONDS = (
  20  # without a sign of life, after which a process counts as dead and the others end
)
JOIN_SECONDS = 300  # for all processes to come
_LAST_WORDS = (
  "error: this process was killed, or ended because another one is gone; the same command in all "
  "processes goes on from the last checkpoint"
)
_SPEAKER = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"


def initialize(how: str, environ: Mapping[str, str] = os.environ) -> None:
  """Joins the other processes; does nothing where there are none. Before any use of JAX's devices.

  Args:
    how: "detect"; "auto": whatever JAX finds, asking the metadata server of a Cloud TPU too; "off";
      or "HOST:PORT,PROCESSES,INDEX", with the address of process 0.
    environ: of the process.

  Raises:
    ConfigError: `how` is none of these, or the processes do not find each other.
  """
  if how == "off" or how == DETECT and not several(environ):
    return
  given = {} if how in (DETECT, "auto") else explicit(how)
  _leave_last_words()
  import jax  # not at the top: a mistake on the command line is told before JAX is loaded

  try:
    jax.distributed.initialize(
      **given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=JOIN_SECONDS
    )
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      "distributed",
      how,
      f"the processes did not find each other: {error}; start the same command in "
      "each of them, or say --distributed=HOST:PORT,PROCESSES,INDEX, or off",
    ) from error


def several(environ: Mapping[str, str]) -> bool:
  """Whether the environment is that of one of several processes that a launcher started
  together."""
  if (
    "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ
  ):  # of srun; a batch script alone has no step
    return (
      _count(
        environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
      )
      > 1
    )
  if "OMPI_MCA_orte_hnp_uri" in environ:
    return _count(environ, "OMPI_COMM_WORLD_SIZE") > 1
  return (
    "," in environ.get("TPU_WORKER_HOSTNAMES", "") or _count(environ, "MEGASCALE_NUM_SLICES") > 1
  )


def _count(environ: Mapping[str, str], name: str) -> int:
  """The number that a variable holds; 1 where it is not set.

  Raises:
    ConfigError: it holds something else.
  """
  text = environ.get(name, "1").strip()
  if not (text.isascii() and text.isdigit() and len(text) < 10):
    raise ConfigError(
      f"environment variable {name}",
      text,
      "must be a number of processes; unset it, or say "
      "--distributed=off or --distributed=HOST:PORT,PROCESSES,INDEX",
    )
  return int(text)


def explicit(how: str) -> dict[str, str | int]:
  """The arguments of `jax.distributed.initialize` in "HOST:PORT,PROCESSES,INDEX".

  Raises:
    ConfigError: it is not of this form.
  """
  address, *numbers = how.split(",")
  host, _, port = address.rpartition(":")

  def number(text):
    return text.isdecimal() and len(text) < 10

  if not (
    host
    and number(port)
    and 0 < int(port) < 2**16
    and len(numbers) == 2
    and all(map(number, numbers))
  ):
    raise ConfigError(
      "distributed",
      how,
      f"must be {DETECT}, auto, off or HOST:PORT,PROCESSES,INDEX, such as 10.0.0.1:1234,4,0",
    )
  processes, index = map(int, numbers)
  if not index < processes:
    raise ConfigError(
      "distributed",
      how,
      f"of {processes} processes the first has INDEX 0 and the last {processes - 1}",
    )
  return {"coordinator_address": address, "num_processes": processes, "process_id": index}


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Ends this process at once where its body fails for want of another one; does nothing else.

  Outside of it stands what would wait for the others, such as a checkpoint that is being saved.
  """
  import jax

  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    print(
      f"process {jax.process_index()} of {jax.process_count()} lost another one: "
      f"{str(error).strip().splitlines()[0]}",
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)  # the usual way out waits for all processes


def any_process(flag: bool) -> bool:
  """Whether `flag` is so on any process; all of them have to ask."""
  import jax

  if jax.process_count() == 1:
    return flag
  import numpy as np
  from jax.experimental import multihost_utils

  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _leave_last_words() -> None:
  """Has a process of its own print `_LAST_WORDS` if this one ends otherwise than by Python's usual
  way out.

  JAX's runtime aborts a process whose partners are gone from a thread of its own, with a trace of
  its C++; nothing in this process can speak after that, or after SIGKILL.
  """
  speaker = subprocess.Popen(
    [sys.executable, "-I", "-S", "-c", _SPEAKER, _LAST_WORDS],
    stdin=subprocess.PIPE,
    start_new_session=True,
  )  # Ctrl-C is not for it

  def done():
    with contextlib.suppress(OSError):  # it may have been killed
      speaker.communicate(b"done")

  atexit.register(done)
