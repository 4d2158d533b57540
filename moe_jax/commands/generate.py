"""Writes text with a trained model.

  python -m moe_jax generate --workdir=RUN --prompt=TEXT

The text appears while it is written. Without --prompt, it is the beginning of a document.

  --workdir=RUN       the workdir of a training run
  --prompt=TEXT       what the text goes on from; an encoder-decoder fills the gaps <extra_id_0>,
                      <extra_id_1> and so on
  --prompts=FILE      a file with a prompt in each line, which are continued together; each text is
                      printed as a line of JSON with the fields "prompt" and "text"
  --max_tokens=N      the largest number of tokens of a text (default: 128)
  --temperature=T     divides the logits; 0, the default, takes the most likely token
  --top_k=K           draws only among the K most likely tokens
  --top_p=P           draws only among the most likely tokens that together have probability P
  --seed=N            seed of the random numbers (default: 0)
  --stop=TEXT         a text at which the text ends
  --step=N            step of the checkpoint (default: the newest one)
  --mesh=AXIS=N,...   devices along each axis of the mesh (default: one device)
  --router=FILE.py:NAME  the run's own router
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from moe_jax.commands.allocator import keep_memory
from moe_jax.commands.config_file import expand
from moe_jax.commands.flags import Flag, number, positional, take_flags
from moe_jax.commands.guarded import guarded
from moe_jax.commands.trained import TRAINED, load, mesh_sizes
from moe_jax.errors import ConfigError, whole

FLAGS = (
  *TRAINED,
  *map(Flag, ("prompt", "prompts", "max_tokens", "temperature", "top_k", "top_p", "seed", "stop")),
)


def main(argv: Sequence[str]) -> int:
  """Prints the text and returns the exit code."""
  keep_memory()
  return guarded(argv, __doc__, lambda rest: _generate(rest[1:]))


def _generate(args: Sequence[str]) -> int:
  """Does what the arguments say."""
  flags, rest = take_flags(args, FLAGS, config=False)
  positional(rest, ())
  if "prompt" in flags and "prompts" in flags:
    raise ConfigError("prompts", flags["prompts"], "there is a --prompt already; give one of both")
  prompts = _lines(flags["prompts"]) if "prompts" in flags else flags.get("prompt", "")
  options: dict[str, Any] = dict(
    max_tokens=whole("max_tokens", flags.get("max_tokens", "128")),
    temperature=number("temperature", flags.get("temperature", "0")),
    top_k=whole("top_k", flags.get("top_k", "0"), low=0),
    top_p=number("top_p", flags.get("top_p", "1")),
    seed=whole("seed", flags.get("seed", "0"), low=0, high=2**32 - 1),
    stop=[flags["stop"]] if "stop" in flags else [],
  )
  # What the flags say is checked before JAX and the run are loaded.
  from moe_jax.generation import Sampling

  Sampling(options["temperature"], options["top_k"], options["top_p"])
  mesh = mesh_sizes(flags.get("mesh"))
  loaded = load(flags)
  from moe_jax.run.generate import generate
  from moe_jax.run.text_model import text_model

  run = text_model(loaded, mesh=mesh)
  if isinstance(prompts, str):
    print(prompts, end="", flush=True)
    generate(run, prompts, on_text=lambda _, new: print(new, end="", flush=True), **options)
    print(flush=True)
  else:
    for prompt, text in zip(prompts, generate(run, prompts, **options), strict=True):
      print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)
  return 0


def _lines(path: str) -> list[str]:
  """Returns the lines of a file, without empty ones.

  Raises:
    ConfigError: The file cannot be read or has no line.
  """
  try:
    lines = expand("prompts", path).read_text(encoding="utf-8").splitlines()
  except (OSError, ValueError) as error:
    raise ConfigError(
      "prompts", path, f"cannot be read ({error}); give a text file with a prompt in each line"
    ) from error
  prompts = [line for line in lines if line]
  if not prompts:
    raise ConfigError("prompts", path, "has no line; give a text file with a prompt in each line")
  return prompts


if __name__ == "__main__":
  sys.exit(main(sys.argv))
