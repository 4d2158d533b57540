"""What the compilers said, kept: the same program for the same machine is compiled once."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

from moe_jax.data import cache

_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")


def versions() -> dict[str, str]:
  """Of the packages that make a program, as far as they are installed."""
  found = {}
  for name in _COMPILERS:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def remembered(
  program: str, machine: str, options: Any, make: Callable[[], dict[str, Any]]
) -> tuple[dict, bool]:
  """`(facts, whether they were known)`: `make()`, or what it returned before for the same arguments
  and versions.

  Args:
    program: StableHLO text.
    machine: names the topology and how the mesh lies on it.
    options: of the compiler.
    make: returns what JSON can hold.
  """
  key = cache.key("dryrun 1", program, machine, options, sorted(versions().items()))
  path = cache.cache_dir("") / "dryrun" / f"{key}.json.gz"
  made = []

  def write(file):
    made.append(1)
    file.write(gzip.compress(json.dumps(make()).encode()))

  content = cache.content(cache.built(path, write))
  return json.loads(gzip.decompress(content.tobytes())), not made
