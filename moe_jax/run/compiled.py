"""The cache of compiled programs on disk, with which a second start takes seconds."""

from __future__ import annotations

import hashlib
import pathlib
import platform
from typing import Any

import jax

# Some hundred programs of the size of quickstart's. Beyond it, those not used for longest go.
MOST_BYTES = 2 * 10**9
# Programs that take less time to compile are compiled again.
LEAST_SECONDS = 0.1


def use_cache(folder: pathlib.Path) -> str:
  """Makes JAX keep compiled programs below `folder`, and look there first.

  Processes can share the folder: JAX locks it, and a damaged file in it is compiled anew. Nothing
  is changed if the user has chosen a folder (JAX_COMPILATION_CACHE_DIR) or none
  (JAX_ENABLE_COMPILATION_CACHE=false).

  Args:
    folder: The folder of the project's caches.

  Returns:
    A warning if the folder cannot be written, and otherwise "".
  """
  config: Any = jax.config  # its options are no declared attributes
  if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
    return ""
  place = folder / "compiled" / _processor()
  try:
    place.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    return f"compiled programs are not kept, because {place} cannot be made: {error.strerror}"
  config.update("jax_compilation_cache_max_size", MOST_BYTES)
  config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
  config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  config.update("jax_compilation_cache_dir", str(place))
  return ""


def _processor() -> str:
  """Returns a name of this kind of processor.

  A program for CPUs is machine code for one kind, which JAX's own key does not name. A home
  directory may be shared by machines with different ones.
  """
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = [platform.processor()]
  named = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
  described = "\n".join(dict.fromkeys(named or lines))
  return f"{platform.machine()}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
