"""Tells glibc's memory allocator what a command does with memory.

Both functions must be called before threads start, and do nothing with another C library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping

# Parameters of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
SPARING_ARENAS = 2  # heaps of a command that spares memory
# From this size on, such a command takes blocks from the system one by one, and returns them to it.
_SMALL_BLOCK = 1 << 16
# Bytes. `mallopt` takes no larger number but -1, with which the heap would never shrink: a model of
# 3 GB then took 7.4 GB.
_LARGEST = 2**31 - 1


def spare_memory() -> None:
  """Makes glibc return to the system what a compiler frees.

  By default glibc gives each thread its own heap, up to eight for each core, and memory that one
  heap has freed is of no use to the others. It also raises the size from which on blocks are
  returned with each large block that is freed.
  """
  _set({_ARENA_MAX: SPARING_ARENAS, _MMAP_THRESHOLD: _SMALL_BLOCK, _TRIM_THRESHOLD: _SMALL_BLOCK})


def keep_memory() -> None:
  """Makes glibc keep what is freed, if JAX computes on the CPU.

  XLA's programs allocate their temporary buffers anew in each step. By default glibc returns them
  to the system after the step, and the next step pays for as many fresh pages, a fifth of a small
  model's time. Now up to 2 GB of free memory are kept at the end of the heap, and steps whose
  buffers are near that size gain less. All threads share one heap, because only that one can keep
  blocks above 64 MB.
  """
  if computes_on_cpu():
    _set({_ARENA_MAX: 1, _MMAP_THRESHOLD: _LARGEST, _TRIM_THRESHOLD: _LARGEST})


def computes_on_cpu() -> bool:
  """Returns whether JAX will compute on the CPU, without asking for its devices.

  JAX takes the CPU if JAX_PLATFORMS says so, or if neither a plug-in nor the TPU's library is
  installed. Asking JAX itself would start threads.
  """
  chosen = os.environ.get("JAX_PLATFORMS", "")
  if chosen:
    return chosen == "cpu"
  return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def _set(values: Mapping[int, int]) -> None:
  """Sets parameters of glibc's allocator."""
  try:
    for parameter, value in values.items():
      ctypes.CDLL(None).mallopt(parameter, value)
  except (AttributeError, OSError, TypeError):
    pass
