"""Caches what compilers report, so that a program is compiled for a machine only once."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

from moe_jax.data import cache

_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")


def versions() -> dict[str, str]:
  """Returns the versions of those packages that affect a program and are installed."""
  installed = {}
  for name in _COMPILERS:
    try:
      installed[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return installed


def remembered(
  program: str, machine: str, options: Any, make: Callable[[], dict[str, Any]]
) -> tuple[dict, bool]:
  """Returns `make()`, or its earlier result for the same arguments and package versions.

  Args:
    program: The program as StableHLO text.
    machine: The name of the topology and the order in which the mesh uses its devices.
    options: The options of the compiler.
    make: A function that returns a dictionary which JSON can represent.

  Returns:
    The dictionary, and whether it came from the cache.
  """
  key = cache.key("dryrun 1", program, machine, options, sorted(versions().items()))
  path = cache.cache_dir("") / "dryrun" / f"{key}.json.gz"
  calls = []

  # This is called only if the file does not exist yet.
  def write(file):
    calls.append(1)
    file.write(gzip.compress(json.dumps(make()).encode()))

  content = cache.content(cache.built(path, write))
  return json.loads(gzip.decompress(content.tobytes())), not calls
