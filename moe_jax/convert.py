"""Converts between published checkpoints (Hugging Face's safetensors) and workdirs.

  python -m moe_jax convert CHECKPOINT WORKDIR
  python -m moe_jax convert WORKDIR CHECKPOINT [--step=N]

The first form makes a workdir of a folder with config.json and safetensors, and takes its tokenizer
along. Train on from its weights, or load them in Python with `moe_jax.load_run`:

  python -m moe_jax train --config=WORKDIR/config.py --workdir=WORKDIR --config.KEY=VALUE ...

The second form writes the newest checkpoint of a workdir, or that of step N, for transformers.

The second folder must not exist yet, or be empty. Weights keep their dtype. docs/interop.md lists
the families, and what of them cannot be expressed.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from moe_jax.commands import Flag, guarded, take_flags
from moe_jax.commands.config_file import expand
from moe_jax.commands.flags import positional
from moe_jax.errors import ConfigError, whole


def main(argv: Sequence[str]) -> int:
  """Converts, prints what was made, and returns the exit code."""
  return guarded(argv, __doc__, lambda rest: _convert(rest[1:]))


def _convert(args: Sequence[str]) -> int:
  """Does what the arguments say."""
  flags, rest = take_flags(args, (Flag("step"),), config=False)
  source, destination = positional(rest, ["SOURCE", "DESTINATION"])
  source, destination = expand("SOURCE", source), expand("DESTINATION", destination)
  step = whole("step", flags["step"], 0, 2**31 - 1) if "step" in flags else None
  from absl import logging

  from moe_jax import interop

  # Orbax warns about what its checkpoints do not need.
  logging.set_verbosity(logging.FATAL)
  if _is_workdir(source):
    interop.to_hugging_face(source, destination, step)
    print(f"{source} -> {destination}, for transformers")
    return 0
  if step is not None:
    raise ConfigError("step", step, "is for a workdir, and SOURCE is a published checkpoint")
  interop.from_hugging_face(source, destination)
  print(
    f"{source} -> {destination}; train on with python -m moe_jax train "
    f"--config={destination / 'config.py'} --workdir={destination}"
  )
  return 0


def _is_workdir(folder: pathlib.Path) -> bool:
  """Returns whether a folder is a workdir, and no published checkpoint."""
  return (folder / "checkpoints").is_dir()


if __name__ == "__main__":
  sys.exit(main(sys.argv))
