"""Tells what a workdir holds: `python -m moe_jax.inspect DIR`."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from moe_jax.commands import guarded, take_flags
from moe_jax.commands.flags import positional
from moe_jax.errors import ConfigError


def main(argv: Sequence[str]) -> int:
  """Prints one line `field: value` for each fact, and returns the exit code.

  It is 2 if the directory is no workdir or cannot be read.
  """

  def print_facts(rest: Sequence[str]) -> int:
    _, arguments = take_flags(rest[1:], (), config=False)
    for name, value in describe(pathlib.Path(positional(arguments, ["DIR"])[0])).items():
      print(f"{name}: {value}")
    return 0

  return guarded(argv, __doc__, print_facts)


def describe(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the facts about a workdir, by name.

  The fact `parameters_sha256` is equal for two runs exactly if all their weights are, bit for bit.

  Raises:
    ConfigError: The directory is no workdir, or its checkpoint is damaged.
  """
  from moe_jax.training import workdir

  for what, wrong in (
    ("there is no such directory", not directory.exists()),
    ("is a file", directory.is_file()),
    ("holds no config.json", not (directory / "config.json").is_file()),
  ):
    if wrong:
      raise ConfigError(
        "workdir", str(directory), f"{what}; give the --workdir of a run of moe_jax.train"
      )
  meta = workdir.read_json(directory / "meta.json") or {}
  start = (meta.get("starts") or [{}])[-1]
  found = {
    "workdir": directory,
    "config": meta.get("config", "unknown"),
    "starts": len(meta.get("starts", [])),
    "python": start.get("python", "unknown"),
  }
  found |= {
    "versions": ", ".join(
      f"{name} {version}" for name, version in start.get("packages", {}).items()
    ),
    "commit": start.get("commit"),
    "devices": start.get("devices", "unknown"),
    "tokenizer": meta.get("tokenizer", "unknown"),
  }
  found |= {f"data {name}": sha for name, sha in meta.get("data", {}).items()}
  return found | _weights(directory / "checkpoints")


def _weights(directory: pathlib.Path) -> dict[str, Any]:
  from absl import logging

  from moe_jax.training import checkpoints

  logging.set_verbosity(logging.ERROR)
  steps = checkpoints.steps(directory)
  if not steps:
    return {"checkpoints": "none"}
  params = checkpoints.load_params(directory, steps[-1])
  return {
    "checkpoints": ", ".join(map(str, steps)),
    "step": steps[-1],
    "parameters": checkpoints.count(params),
    "parameters_sha256": checkpoints.parameters_sha256(params),
  }


if __name__ == "__main__":
  sys.exit(main(sys.argv))
