"""Executes the commands of README and the tutorials: `make docs-check`.

  python tests/docs_commands.py [PAGE ...]

Every command of a block marked ```sh is run in a copy of the repository, in the order in which a
reader would paste it, with the files that the page asks the reader to save. What trains is cut to
two steps and small evaluations. Commands that install something, and `make`, are listed and not
run. The exit code is 1 if a command ends with another code than 0.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import docs_test  # noqa: E402

STEPS = 2
SHORT = [
  f"--config.train.steps={STEPS}",
  "--config.optimizer.warmup_steps=0",
  "--config.train.eval_batches=1",
  "--config.train.final_eval_batches=1",
  "--config.report.ladder_megabytes=0",
]
LEFT_OUT = ("pip", "make", "python3", "source")
SECONDS = 900  # after which a command counts as hanging


def shortened(words: list[str]) -> list[str]:
  """Returns a command that trains for two steps only, if it trains."""
  command = " ".join(words[:4])
  helps = any(word.startswith("--help") for word in words)
  if command.startswith(("python -m moe_jax train", "python -m moe_jax launch")) and not helps:
    return [*words, *SHORT]
  if words[:3] == ["python", "-m", "experiments"] and words[4:5] == ["run"]:
    # The number of steps may be set in either way.
    kept = [word for word in words if not word.startswith(("train.steps=", "--steps="))]
    if "--set" in kept and kept[kept.index("--set") + 1].startswith("--"):
      kept.remove("--set")
    return [*kept, f"--steps={STEPS}"]
  return words


def execute(words: list[str], folder: pathlib.Path) -> tuple[int, str]:
  """Returns the exit code of a command and its last line of output."""
  words = [sys.executable, *words[1:]] if words[0] == "python" else words
  environment = os.environ | {"PYTHONPATH": str(folder)}
  try:
    done = subprocess.run(
      words, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
  except subprocess.TimeoutExpired:
    return 124, f"did not end within {SECONDS} s"
  lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
  return done.returncode, lines[-1] if lines else ""


def main(names: list[str]) -> int:
  """Executes the commands of the pages with these names, or of all, and returns the exit code."""
  pages = [page for page in docs_test.PAGES if not names or docs_test.relative(page) in names]
  done, failed = set(), []
  with tempfile.TemporaryDirectory(prefix="docs_commands_") as temporary:
    folder = pathlib.Path(temporary) / "clone"
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "site", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for page in pages:
      docs_test.saved_files(docs_test.relative(page), folder)
      for line in (line for at, lines in docs_test.blocks("sh") if at == page for line in lines):
        words = shlex.split(line, comments=True)
        if not words or (text := shlex.join(words)) in done:
          continue
        done.add(text)
        if words[0] in LEFT_OUT:
          print(f"left out  {text}", flush=True)
          continue
        begun = time.monotonic()
        code, last = execute(shortened(words), folder)
        print(f"{time.monotonic() - begun:6.0f} s  exit {code}  {text}", flush=True)
        if code:
          print(f"          {last}", flush=True)
          failed.append(text)
  print(f"{len(done)} commands, {len(failed)} failed")
  return int(bool(failed))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
