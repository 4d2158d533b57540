"""A command keeps the memory that each step needs again, or gives back what a compiler freed."""

import ctypes
import os
import subprocess
import sys

import pytest

from moe_jax.commands import allocator

pytestmark = [
  pytest.mark.unit,
  pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt"
  ),
]

# A thread touches 200 MB, frees them, and does so again; the second time is counted.
FAULTS = """
import ctypes, resource, sys, threading
from moe_jax.commands import allocator
getattr(allocator, sys.argv[1], lambda: None)()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
  ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p])
def touch():
  block = libc.malloc(200 << 20)
  ctypes.memset(block, 1, 200 << 20)
  libc.free(block)
def twice():
  touch()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  touch()
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=twice)
thread.start()
thread.join()
"""


def faults(function, **variables):
  """Returns the page faults of a thread that touches 200 MB for the second time."""
  environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | variables
  output = subprocess.run(
    [sys.executable, "-c", FAULTS, function], env=environment, capture_output=True, check=True
  ).stdout
  return int(output)


def test_a_step_finds_its_memory_again():
  # Catches a parameter that glibc refuses, heaps of threads that give their blocks back, and a
  # machine with an accelerator whose processes keep what they should not.
  assert faults("keep_memory", JAX_PLATFORMS="cpu") < 100
  pages = (200 << 20) // os.sysconf("SC_PAGE_SIZE")
  # Pages may be larger than the smallest ones, of which then one fault stands for many.
  assert faults("none") > 100
  assert faults("keep_memory", JAX_PLATFORMS="cuda") > 100
  assert faults("spare_memory") in range(100, 2 * pages)


@pytest.mark.parametrize(
  ("chosen", "installed", "cpu"),
  [
    ("cpu", {"libtpu"}, True),
    ("cuda", set(), False),
    ("tpu,cpu", set(), False),
    ("", set(), True),
    ("", {"jax_plugins"}, False),
    ("", {"libtpu"}, False),
  ],
)
def test_the_cpu_computes_if_nothing_else_does(monkeypatch, chosen, installed, cpu):
  # Catches an installed plug-in that is overlooked, and JAX_PLATFORMS that is not obeyed.
  monkeypatch.setenv("JAX_PLATFORMS", chosen)
  monkeypatch.setattr(
    allocator.importlib.util, "find_spec", lambda name: name if name in installed else None
  )
  assert allocator.computes_on_cpu() == cpu
