"""Measures a trained model on text, or on tasks of lm-evaluation-harness.

  python -m moe_jax evaluate --workdir=RUN [--sources=SOURCE,...]
  python -m moe_jax evaluate --workdir=RUN --tasks=TASK,...

On text, it prints bits per byte, perplexity and the number of tokens of each source. Tokens are
routed as in evaluations of the training run.

  --workdir=RUN          the workdir of a training run
  --sources=SOURCE,...   sources of text as in data.sources, such as text:books/*.txt (default:
                         those of the run)
  --split=SPLIT          held_out reads the documents that the run has held out, all reads all
                         (default: held_out for sources of the run, all for others)
  --batches=N            the largest number of batches of each source (default: 0, all of it)
  --tasks=TASK,...       tasks of lm-evaluation-harness (pip install -e '.[eval]')
  --task_folder=DIR      a folder with task files of your own; only these are known then
  --fewshot=N            examples before each question (default: that of the task)
  --limit=N              documents of each task that are used (default: all)
  --batch_size=N         rows that are read at once (default: those of a microbatch in training; 8
                         for tasks)
  --out=FILE             a JSON file for the results, which must not exist yet
  --step=N               step of the checkpoint (default: the newest one)
  --mesh=AXIS=N,...      devices along each axis of the mesh (default: one device)
  --router=FILE.py:NAME  the run's own router
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.commands.allocator import keep_memory
from moe_jax.commands.config_file import expand
from moe_jax.commands.flags import Flag, positional, take_flags
from moe_jax.commands.guarded import guarded
from moe_jax.commands.trained import TRAINED, load, mesh_sizes
from moe_jax.errors import ConfigError, whole

_TEXT = ("sources", "split", "batches")
_TASKS = ("task_folder", "fewshot", "limit")
FLAGS = (*TRAINED, *map(Flag, (*_TEXT, "tasks", *_TASKS, "batch_size", "out")))


def main(argv: Sequence[str]) -> int:
  """Prints the measures and returns the exit code."""
  keep_memory()
  return guarded(argv, __doc__, lambda rest: _evaluate(rest[1:]))


def _evaluate(args: Sequence[str]) -> int:
  """Does what the arguments say."""
  flags, rest = take_flags(args, FLAGS, config=False)
  positional(rest, ())
  wrong = [name for name in (_TEXT if "tasks" in flags else _TASKS) if name in flags]
  if wrong:
    needed = "for text, without --tasks" if "tasks" in flags else "for --tasks"
    raise ConfigError(wrong[0], flags[wrong[0]], f"is {needed}; leave it out")
  numbers = {
    name: whole(name, flags[name], low)
    for name, low in (("batches", 0), ("fewshot", 0), ("limit", 1), ("batch_size", 1))
    if name in flags
  }
  out = _out(flags.get("out"))
  mesh = mesh_sizes(flags.get("mesh"))
  run = load(flags)
  if "tasks" in flags:
    from moe_jax.run.harness import evaluate_tasks

    if "fewshot" in numbers:
      numbers["num_fewshot"] = numbers.pop("fewshot")
    folder = expand("task_folder", flags["task_folder"]) if "task_folder" in flags else None
    results = evaluate_tasks(run, _names(flags["tasks"]), task_folder=folder, mesh=mesh, **numbers)
    print("\n".join(task_lines(results)))
  else:
    from moe_jax.run.evaluate import evaluate

    results = evaluate(
      run, _names(flags.get("sources", "")), split=flags.get("split", ""), mesh=mesh, **numbers
    )
    print("\n".join(text_lines(results)))
  if out is not None:
    # JSON has no NaN and no functions.
    out.write_text(json.dumps(_plain(results), indent=1) + "\n", encoding="utf-8")
  return 0


def _names(text: str) -> list[str]:
  """Returns the names of a list with commas."""
  return [name for name in text.split(",") if name]


def _out(path: str | None) -> pathlib.Path | None:
  """Returns the file for the results.

  Raises:
    ConfigError: It exists already, or its folder does not.
  """
  if path is None:
    return None
  file = expand("out", path)
  if file.exists() or not file.parent.is_dir():
    what = "exists already" if file.exists() else "is in a folder that does not exist"
    raise ConfigError("out", path, f"{what}; name a new file in a folder that exists")
  return file


def text_lines(results: Mapping[str, Mapping[str, int | float]]) -> list[str]:
  """Returns a table with a line for each source."""
  columns = ("bits_per_byte", "perplexity", "loss", "tokens", "bytes")
  width = max(map(len, ("source", *results)))
  lines = [f"{'source':{width}}" + "".join(f"{name:>15}" for name in columns)]
  for source, measures in results.items():
    cells = (_cell(measures[name]) for name in columns)
    lines.append(f"{source:{width}}" + "".join(f"{cell:>15}" for cell in cells))
  return lines


def _cell(value: int | float) -> str:
  """Returns a count, or a number with four decimals, or "-" if it is not finite."""
  if isinstance(value, int):
    return f"{value:,}"
  return f"{value:.4f}" if math.isfinite(value) else "-"


def task_lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Returns a line for each measure of each task, with its standard error if there is one."""
  lines = []
  for task, measures in results.items():
    for name, value in measures.items():
      measure, _, filtered = name.partition(",")
      if not isinstance(value, (int, float)) or "_stderr" in measure or not filtered:
        continue
      error = measures.get(f"{measure}_stderr,{filtered}")
      shown = f" +- {error:.4f}" if isinstance(error, float) else ""
      lines.append(f"{task}: {measure} {value:.4f}{shown}")
  return lines


def _plain(value: Any) -> Any:
  """Returns a value that JSON can hold: None for numbers that are not finite, else text."""
  if isinstance(value, Mapping):
    return {str(name): _plain(entry) for name, entry in value.items()}
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
