"""Starts JAX's multi-controller runtime, in which several processes train one model.

Every process runs the same command and joins the others before anything asks JAX for devices. Under
SLURM (`srun`), under Open MPI (`mpirun`), and on TPU slices whose environment lists several hosts,
the processes find each other. Elsewhere each needs `--distributed=HOST:PORT,PROCESSES,INDEX`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.errors import ConfigError

# The flag's default, which joins other processes only if the environment shows that there are some.
DETECT = "detect"
# A process that has sent no heartbeat for so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 20
JOIN_SECONDS = 300  # the longest time to wait until all processes have joined
_LAST_WORDS = (
  "error: this process was killed, or ended because another one is gone; the same command in all "
  "processes goes on from the last checkpoint"
)
# The program of the process that prints `_LAST_WORDS`. It waits until its input is closed, and
# prints nothing if something was written into it before.
_SPEAKER = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"


def initialize(how: str, environ: Mapping[str, str] = os.environ) -> None:
  """Joins the other processes of the run, or does nothing if there are none.

  This must be called before anything uses JAX's devices.

  Args:
    how: "detect" joins if `several` recognises a launcher. "auto" leaves the detection to JAX,
      which also asks the metadata server of a Cloud TPU. "off" never joins.
      "HOST:PORT,PROCESSES,INDEX" gives the address of process 0, the number of processes, and the
      index of this one.
    environ: The environment variables of the process.

  Raises:
    ConfigError: If `how` is none of these, or if the processes do not find each other.
  """
  if how == "off" or how == DETECT and not several(environ):
    return
  arguments = {} if how in (DETECT, "auto") else explicit(how)
  _leave_last_words()
  # Imported here so that mistakes on the command line are reported before JAX is loaded.
  import jax

  try:
    jax.distributed.initialize(
      **arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=JOIN_SECONDS
    )
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      "distributed",
      how,
      f"the processes did not find each other: {error}; start the same command in "
      "each of them, or set --distributed=HOST:PORT,PROCESSES,INDEX, or off",
    ) from error


def several(environ: Mapping[str, str]) -> bool:
  """Returns whether a launcher has started this process together with others.

  The launchers that are recognised are srun, mpirun, and those of TPU slices.

  Args:
    environ: The environment variables of the process.

  Raises:
    ConfigError: If a variable that should hold a number of processes holds something else.
  """
  # These are set by srun. A batch script outside srun is no step, and so has no list of its nodes.
  if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
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
  """Returns the number in an environment variable, or 1 if the variable is not set.

  Raises:
    ConfigError: If the variable holds something else.
  """
  text = environ.get(name, "1").strip()
  if not (text.isascii() and text.isdigit() and len(text) < 10):
    raise ConfigError(
      f"environment variable {name}",
      text,
      "must be a number of processes; unset it, or set "
      "--distributed=off or --distributed=HOST:PORT,PROCESSES,INDEX",
    )
  return int(text)


def explicit(how: str) -> dict[str, Any]:
  """Parses "HOST:PORT,PROCESSES,INDEX" into arguments of `jax.distributed.initialize`.

  Raises:
    ConfigError: If `how` does not have this form.
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
  """Returns a context manager that ends this process at once if another process is lost.

  A lost process shows as an error of JAX's runtime in the body. With one process, errors are raised
  as usual. Code that waits for the other processes when it is left, such as the saving of a
  checkpoint, must be outside this context, because it would wait for ever.
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
    # A normal exit would wait for all processes.
    os._exit(1)


def any_process(flag: bool) -> bool:
  """Returns whether `flag` is True on any process. All processes must call this together."""
  import jax

  if jax.process_count() == 1:
    return flag
  import numpy as np
  from jax.experimental import multihost_utils

  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _leave_last_words() -> None:
  """Starts a process that prints `_LAST_WORDS` if this one does not exit normally.

  If other processes are lost, JAX's runtime aborts this one from a thread of C++, with a stack
  trace. Nothing in this process can print a message after that, or after SIGKILL.
  """
  # The speaker has a session of its own, so that Ctrl-C does not reach it.
  speaker = subprocess.Popen(
    [sys.executable, "-I", "-S", "-c", _SPEAKER, _LAST_WORDS],
    stdin=subprocess.PIPE,
    start_new_session=True,
  )

  def done():
    # The speaker may have been killed.
    with contextlib.suppress(OSError):
      speaker.communicate(b"done")

  atexit.register(done)
