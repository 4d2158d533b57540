"""Analyses what the experts of a trained model specialise in.

  python -m moe_jax analyse --workdir=RUN [--sources=SOURCE,...]

Each source of text is a domain. The command prints two findings of the papers with their numbers:
whether specialisation is lexical rather than topical, and whether deeper layers route more sharply.
It writes analysis.html, with tables and coloured text, and analysis.json, with all numbers.

  --workdir=RUN          the workdir of a training run, or of an imported checkpoint
  --sources=SOURCE,...   domains, as in data.sources, such as embedded:prose,text:law/*.txt
                         (default: those of the run)
  --split=SPLIT          held_out reads the documents that the run has held out, all reads all
                         (default: held_out for sources of the run, all for others)
  --tokens=N             about how many tokens of each domain are read (default: 32768; 0: all)
  --against=N            step of another checkpoint; shows which tokens change their expert
  --to=DIR               the folder for the files, in which they must not exist yet (default: RUN)
  --batch_size=N         rows that are read at once (default: those of a microbatch in training)
  --step=N               step of the checkpoint (default: the newest one)
  --mesh=AXIS=N,...      devices along each axis of the mesh (default: one device)
  --router=FILE.py:NAME  the run's own router
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.commands.allocator import keep_memory
from moe_jax.commands.config_file import expand
from moe_jax.commands.flags import Flag, positional, take_flags
from moe_jax.commands.guarded import guarded
from moe_jax.commands.trained import TRAINED, load, mesh_sizes
from moe_jax.errors import whole

FLAGS = (*TRAINED, *map(Flag, ("sources", "split", "tokens", "against", "to", "batch_size")))


def main(argv: Sequence[str]) -> int:
  """Prints the findings and the paths of the files, and returns the exit code."""
  keep_memory()
  return guarded(argv, __doc__, lambda rest: _analyse(rest[1:]))


def _analyse(args: Sequence[str]) -> int:
  """Does what the arguments say."""
  flags, rest = take_flags(args, FLAGS, config=False)
  positional(rest, ())
  numbers = {
    name: whole(name, flags[name], low)
    for name, low in (("tokens", 0), ("batch_size", 1))
    if name in flags
  }
  against = whole("against", flags["against"], 0, 10**12) if "against" in flags else None
  mesh = mesh_sizes(flags.get("mesh"))
  from moe_jax.run.analyse import FILES, analyse, destination

  # What is wrong with --workdir itself, `load` says.
  to = expand("to", flags.get("to") or flags.get("workdir") or ".")
  if "to" in flags or (to / "config.json").exists():
    destination(to)
  run = load(flags)
  other = None if against is None else load(flags | {"step": str(against)})
  sources = [name for name in flags.get("sources", "").split(",") if name]
  summary = analyse(
    run, sources, split=flags.get("split", ""), against=other, mesh=mesh, to=to, **numbers
  )
  print("\n".join(lines(summary)))
  for name in FILES:
    print(to / name)
  return 0


def lines(summary: Mapping[str, Any]) -> list[str]:
  """Returns the findings of all stacks, with their verdicts and numbers."""
  from moe_jax.analysis.findings import CLAIMS, sentences

  found = []
  for stack, result in summary["stacks"].items():
    where = f" ({stack})" if len(summary["stacks"]) > 1 else ""
    for name, sentence in sentences(result).items():
      verdict = result["findings"][name]["verdict"]
      found.append(f"{CLAIMS[name]}{where}: {verdict}.")
      found.append(f"  {sentence[0].upper()}{sentence[1:]}")
  return found


if __name__ == "__main__":
  sys.exit(main(sys.argv))
