"""One case of the fuzzer: a mutated config, command line or file, and what became of it.

A case is drawn from its seed and its number alone. Its outcome is one of these:

    runs           the config is valid and its model can be built, or the run goes on and ends with
                   the weights of the undamaged run
    one sentence   exit code 2, or 1 for a fault of the machine, and nothing on disk was lost
    traceback      an exception that nobody expected
    changed        the run ends with other weights than the undamaged one, without a word
    lost           a checkpoint or a line of metrics.jsonl that the mutation had left whole is gone
    user's file    the corpus, the tokenizer or the config file has changed
    hang           there was no answer in time; the parent process says so
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import pathlib
import random
import shutil
import traceback
from collections.abc import Callable
from typing import Any

from experiments.reliability import mutate

OUTCOMES = ("runs", "one sentence", "traceback", "hang", "changed", "lost", "user's file")
FINDINGS = OUTCOMES[2:]
SHARE_TRAINED = 0.15  # the share of valid and small command lines that are trained
SMALL = 2_000_000  # the most parameters, and values of a batch, of a small one
STEPS = (4, 6)  # the steps of the run whose files are mutated, and those that it goes on to
CONFIGS = (
  "base.py",
  "quickstart.py",
  "t5.py:desk",
  "lstm_moe.py:desk",
  "brainformer.py:desk",
  "deepseek_v2.py:desk",
  "switch.py:desk",
)
# The config file of a model with some thousand weights, whose checkpoints are at steps 2 and 4.
MINE = """
from configs import base

def get_config():
  c = base.get_config()
  m, e, t = c.model, c.model.moe, c.train
  m.d_model, m.num_layers, m.num_heads, m.num_kv_heads, m.head_dim, m.d_ff = 16, 2, 2, 2, 8, 32
  e.d_ff, e.num_experts, e.dispatcher.name = 32, 4, "einsum"
  c.data.sources, c.data.tokenizer = ("text:user/corpus/*.txt",), "hf:user/tokenizer.json"
  c.data.cache_dir = "cache"
  c.data.seq_len, c.data.threads, c.data.validation_fraction = 32, 0, 0.3
  t.batch_size, t.log_every, t.eval_every, t.eval_batches, t.checkpoint_every = 4, 1, 2, 1, 2
  c.optimizer.schedule, c.optimizer.warmup_steps, c.mesh.data = "constant", 2, 1
  return c
"""
WORDS = (
  "the expert routes a token to one of many small networks and each learns what it sees best"
).split()


def run(kind: str, number: int, seed: int, home: pathlib.Path) -> dict[str, Any]:
  """Tries a case and returns what became of it.

  Args:
    kind: What is mutated: "config", "command" or "file".
    number: The number of the case.
    seed: The seed of all cases.
    home: The folder in which `prepare` put the run. This process works below it.

  Returns:
    {"kind", "number", "what", "outcome", "said"}.
  """
  draw = random.Random(f"{seed} {kind} {number}")
  os.chdir(home / "whole")
  of_kind = {
    "config": _config,
    "command": functools.partial(_command, home=home),
    "file": functools.partial(_file, home=home),
  }
  # The case notes what it tries, so that the parent can say so if it has to kill this process.
  what, outcome, output = of_kind[kind](
    draw, tell=lambda what: doing(home, kind, number).write_text(repr(what)[:300])
  )
  return {
    "kind": kind,
    "number": number,
    "what": what[:300],
    "outcome": outcome,
    "said": output[-4000:],
  }


def doing(home: pathlib.Path, kind: str, number: int) -> pathlib.Path:
  """Returns the file in which a case notes what it is about to try."""
  return home / f"doing_{kind}_{number}"


def prepare(home: pathlib.Path) -> None:
  """Trains the run whose files are mutated, and notes how it ends.

  The run is in `home/whole`. A copy of it goes on, and `home/sha256` gets its last weights' digest.
  """
  whole = home / "whole"
  (whole / "user" / "corpus").mkdir(parents=True)
  draw = random.Random(0)
  for i in range(20):
    (whole / "user" / "corpus" / f"{i:02}.txt").write_text(
      " ".join(draw.choices(WORDS, k=60)) + "\n"
    )
  (whole / "user" / "mine.py").write_text(MINE)
  _tokenizer(whole / "user" / "tokenizer.json")
  os.chdir(whole)
  code, output = _train(STEPS[0])
  if code:
    raise RuntimeError(f"the run whose files are mutated does not even begin: {output}")
  with _copy(home):
    code, output = _train(STEPS[1])
    if code:
      raise RuntimeError(f"the undamaged run does not go on: {output}")
    (home / "sha256").write_text(_sha256())


def _tokenizer(path: pathlib.Path) -> None:
  """Writes a small BPE tokenizer."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer, made.decoder = (
    pre_tokenizers.ByteLevel(add_prefix_space=False),
    decoders.ByteLevel(),
  )
  made.train_from_iterator(
    [" ".join(WORDS)],
    trainers.BpeTrainer(
      vocab_size=280,
      special_tokens=["<|endoftext|>"],
      show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  made.save(str(path))


def _config(draw: random.Random, tell: Callable[[str], Any]) -> tuple[str, str, str]:
  """Mutates a config, validates it and traces its model.

  Returns:
    What was mutated, the outcome, and what was said.
  """
  from moe_jax import assembly
  from moe_jax.commands import load_config
  from moe_jax.errors import ConfigError

  c = load_config(draw.choice(CONFIGS))
  what = str(mutate.config(draw, c))
  tell(what)
  try:
    assembly.validate(c, 1)
    _built(c)
  except ConfigError as error:
    return what, "one sentence", str(error)
  except Exception:
    return what, "traceback", traceback.format_exc()
  return what, "runs", ""


def _built(c) -> int:
  """Traces the model and returns the number of its parameters."""
  import jax

  from moe_jax import assembly

  variables = assembly.abstract_variables(c, assembly.fixed_vocab_size(c) or 364)
  return sum(leaf.size for leaf in jax.tree.leaves(variables))


def _command(
  draw: random.Random, tell: Callable[[str], Any], home: pathlib.Path
) -> tuple[str, str, str]:
  """Mutates a command line, validates its config, and trains some of the small ones.

  Returns:
    The arguments, the outcome, and what was said.
  """
  from moe_jax import assembly, commands
  from moe_jax.errors import ConfigError

  path = "user/mine.py"
  base = commands.load_config(path)
  args = mutate.arguments(draw, mutate.dotted(base), base)
  what = " ".join(args)
  tell(what)
  trained = draw.random() < SHARE_TRAINED
  try:
    command = commands.parse(["train", f"--config={path}", "--workdir=fresh", *args])
    assembly.validate(command.config, 1)
    tokens = command.config.train.batch_size * command.config.data.seq_len
    small = max(_built(command.config), tokens * command.config.model.num_layers) < SMALL
  except ConfigError as error:
    return what, "one sentence", str(error)
  except Exception:
    return what, "traceback", traceback.format_exc()
  if not (trained and small and str(command.workdir) == "fresh"):
    return what, "runs", ""
  with _copy(home):
    return f"{what} (trained)", *_outcome(*_train(2, *args, workdir="fresh"))


def _train(steps: int, *args: str, workdir: str = "run") -> tuple[int, str]:
  """Trains in this process, without the report at the end.

  Returns:
    The exit code, and the text on standard error.
  """
  from moe_jax import train
  from moe_jax.run import finish

  output = io.StringIO()
  finish.finish = lambda *_, **__: None
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
    code = train.main(
      [
        "train",
        "--config=user/mine.py",
        f"--workdir={workdir}",
        *args,
        f"--config.train.steps={steps}",
      ]
    )
  return code, output.getvalue()


def _outcome(code: int, output: str) -> tuple[str, str]:
  """Returns the outcome that an exit code and a text on standard error mean, and the text."""
  if "Traceback" in output or "is a bug of the program" in output:
    return "traceback", output
  lines = [line for line in output.splitlines() if line.startswith("error: ")]
  if code and len(lines) != 1:
    return "traceback", f"exit code {code} without its one sentence: {output}"
  return ("one sentence" if code else "runs"), output


def _file(
  draw: random.Random, tell: Callable[[str], Any], home: pathlib.Path
) -> tuple[str, str, str]:
  """Mutates a file of the run, lets the run go on, and compares what is left.

  Returns:
    What was mutated, the outcome, and what was said.
  """
  with _copy(home):
    kinds, names = _files(), sorted(mutate.FILES)
    path = draw.choice(kinds[draw.choice(sorted(kinds))])
    how = draw.choices(names, [5 if name in ("flip bits", "truncate") else 1 for name in names])[0]
    tell(f"{how}: {path}")
    mutate.FILES[how](draw, path)
    user, whole = _digests("user"), _digests("run/checkpoints")
    lines = _metrics()
    what = f"{how}: {path}"
    try:
      outcome, output = _outcome(*_train(STEPS[1]))
    except Exception:
      return what, "traceback", traceback.format_exc()
    if user != _digests("user"):
      return what, "user's file", output
    # A run that goes on deletes old checkpoints by itself.
    kept = outcome == "runs" or set(whole.values()) <= set(_digests("run").values())
    if not kept or not lines <= _metrics():
      return what, "lost", output
    if outcome == "runs":
      try:
        if _sha256() != (home / "sha256").read_text():
          return what, "changed", output
      except Exception:
        return what, "traceback", traceback.format_exc()
    return what, outcome, output


@contextlib.contextmanager
def _copy(home: pathlib.Path):
  """Makes a copy of the run after its first steps the working directory.

  The paths in the run are relative, so that they mean files of the copy.
  """
  place = home / f"copy_{os.getpid()}"
  mutate.remove(place)
  shutil.copytree(home / "whole", place, symlinks=True)
  os.chdir(place)
  try:
    yield
  finally:
    os.chdir(home / "whole")
    mutate.remove(place)


def _files() -> dict[str, list[pathlib.Path]]:
  """Returns kind -> the files of that kind in the working directory.

  Files with large arrays are in it several times, so that they are drawn more often.
  """
  files: dict[str, list[pathlib.Path]] = {}
  for path in sorted(p for p in pathlib.Path().rglob("*") if p.is_file()):
    parts = path.parts
    if "__pycache__" in parts:
      continue
    kind = parts[0] if parts[0] == "cache" else "/".join(parts[:2])
    if kind == "run/checkpoints":
      kind = "arrays" if "d" in parts else "/".join(parts[3:4])
    files.setdefault(kind, []).extend(
      [path] * (1 + path.stat().st_size // 20_000 if kind == "arrays" else 1)
    )
  return files


def _digests(folder: str) -> dict[str, str]:
  """Returns path -> digest of each file below a folder."""

  def digest(p):
    return hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "no file"

  return {
    str(p): digest(p)
    for p in sorted(pathlib.Path(folder).rglob("*"))
    if (p.is_file() or p.is_symlink()) and "__pycache__" not in p.parts
  }


def _metrics() -> set[tuple[int, str]]:
  """Returns step and kind of each readable line of metrics, in whatever file of the run it is."""
  lines = set()
  for path in pathlib.Path("run").glob("*metrics*"):
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
      with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        entry = json.loads(line)
        named = isinstance(entry["step"], int) and isinstance(entry["kind"], str)
        if named and "loss" in str(line):
          lines.add((entry["step"], entry["kind"]))
  return lines


def _sha256() -> str:
  from moe_jax import inspect

  with contextlib.redirect_stderr(io.StringIO()):
    return inspect.describe(pathlib.Path("run"))["parameters_sha256"]


def prepare_in(home: pathlib.Path) -> str:
  """Calls `prepare` and returns "ready", or the traceback of what went wrong."""
  try:
    prepare(home)
  except Exception:
    return traceback.format_exc()
  return "ready"
