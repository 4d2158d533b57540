"""All commands of the package: `python -m moe_jax COMMAND ...` or `moe-jax COMMAND ...`."""

from __future__ import annotations

import importlib
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.errors import choose, jax_is_missing


class Entry(NamedTuple):
  """A command.

  Attributes:
    module: The module whose `main(argv)` it is.
    summary: What it does, in a line.
  """

  module: str
  summary: str


COMMANDS = {
  "train": Entry("moe_jax.train", "trains a config, or goes on with a run that stopped"),
  "launch": Entry("moe_jax.launch", "trains with several processes on this machine"),
  "describe": Entry("moe_jax.describe", "prints the size and the cost of a config's model"),
  "evaluate": Entry(
    "moe_jax.commands.evaluate", "measures a trained model on text and on benchmark tasks"
  ),
  "analyse": Entry(
    "moe_jax.commands.analyse", "shows what the experts of a trained model specialise in"
  ),
  "generate": Entry("moe_jax.commands.generate", "writes text with a trained model"),
  "inspect": Entry("moe_jax.inspect", "prints what a run's workdir holds"),
  "report": Entry("moe_jax.report.__main__", "rebuilds the report of a run"),
  "compare": Entry("moe_jax.compare", "compares runs: overlaid curves and tables on one page"),
  "filter": Entry(
    "moe_jax.commands.filter", "filters text by quality, fluency and likeness to advertising"
  ),
  "convert": Entry("moe_jax.convert", "makes workdirs of published checkpoints, and the reverse"),
  "surgery": Entry(
    "moe_jax.surgery.__main__", "makes experts of dense FFNs, divides them, or adds experts"
  ),
  "routers": Entry("moe_jax.routers", "lists the routers and the presets"),
  "dryrun": Entry(
    "moe_jax.dryrun.__main__", "compiles a training step for a machine that is not there"
  ),
}
# The keys that the overview shows, because most commands change one of them.
_COMMON_KEYS = (
  "model.d_model",
  "model.num_layers",
  "model.moe.num_experts",
  "model.moe.capacity_factor",
  "data.sources",
  "data.tokenizer",
  "optimizer.learning_rate",
  "train.steps",
  "train.batch_size",
  "mesh.data",
  "mesh.expert",
)


def run() -> None:
  """The console entry point."""
  sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
  """Runs the command that `argv[1]` names with the arguments after it, and returns its exit code.

  Without a command, or with --help in its place, it prints an overview, and with --version the
  versions. The exit code is 1, with a sentence on how to install it, if JAX is missing.
  """
  name = argv[1] if len(argv) > 1 else "--help"
  if name == "--version":
    print(version())
    return 0
  if jax_is_missing():
    return 1
  if name in COMMANDS:
    # Only the command itself is imported: `dryrun` sets what JAX reads when it is imported.
    return importlib.import_module(COMMANDS[name].module).main([name, *argv[2:]])
  from moe_jax.commands import guarded

  return guarded(argv[:1], None, lambda _: _other(name))


def _other(name: str) -> int:
  """Prints the overview if help is asked for; otherwise there is no such command."""
  if name not in ("-h", "--help", "help"):
    choose("command", name, COMMANDS)
  print(overview())
  return 0


def version() -> str:
  """Returns the versions of the package, JAX and Python, and where the package lies."""

  def installed(name):
    try:
      return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      return "(not installed)"

  folder = pathlib.Path(__file__).resolve().parent
  python = platform.python_version()
  return f"moe_jax {installed('moe_jax')} in {folder}, jax {installed('jax')}, Python {python}"


def overview() -> str:
  """Returns the commands, configs, presets and most used keys as text."""
  import textwrap

  from moe_jax.assembly.presets import PRESETS
  from moe_jax.assembly.sections import find_key
  from moe_jax.commands.config_file import config_names

  def listed(names: Sequence[str]) -> str:
    return textwrap.fill(", ".join(names), 96, initial_indent="  ", subsequent_indent="  ")

  width = max(map(len, COMMANDS))
  commands = "\n".join(f"  {name:{width}}  {entry.summary}" for name, entry in COMMANDS.items())
  keys = {name: key for name in _COMMON_KEYS if (key := find_key(name))}
  lines = "\n".join(
    f"  --config.{name}={key.default}\n"
    + textwrap.fill(key.doc, 96, initial_indent="      ", subsequent_indent="      ")
    for name, key in keys.items()
  )
  return f"""usage: python -m moe_jax COMMAND ... (or moe-jax COMMAND ...), or --version

Commands; each has --help:
{commands}

An example:
  python -m moe_jax train --config=quickstart --workdir=runs/quickstart

Configs, for --config=NAME or --config=NAME:VARIANT, such as mixtral:desk or mixtral:8x7b:
{listed(config_names())}

Routings of the papers, for --config.model.moe=NAME:
{listed(sorted(PRESETS))}

Some keys with their defaults; --help=all, or docs/options.md, has all of them:
{lines}"""


if __name__ == "__main__":
  run()
