"""The small run that the reliability tools train: a thousand weights on a few kilobytes of text."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import pathlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The programs run for a moment only, so that optimising their machine code would take longer than
# it saves. XLA ends a process for a flag that it does not know, hence the test of the version.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" + (
  " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10.")
)
WORDS = (
  "the expert routes a token to one of many small networks and each learns what it sees best"
).split()
# The run has all that a run can have: experts under scan, a bias that balancing moves, noise,
# dropout, accumulation, and evaluations.
KEYS: Mapping[str, Any] = {
  "model.d_model": 16,
  "model.num_layers": 4,
  "model.num_heads": 2,
  "model.num_kv_heads": 2,
  "model.head_dim": 8,
  "model.d_ff": 32,
  "model.moe.d_ff": 32,
  "model.moe.num_experts": 4,
  "model.moe.dispatcher.name": "einsum",
  "model.moe.jitter": 0.01,
  "model.moe.balancing.rule": "sign",
  "model.dropout": 0.1,
  "data.seq_len": 32,
  "data.threads": 1,
  "data.validation_fraction": 0.3,
  "train.batch_size": 4,
  "train.accumulate_steps": 2,
  "train.steps": 40,
  "train.log_every": 2,
  "train.eval_every": 10,
  "train.eval_batches": 1,
  "train.checkpoint_every": 5,
  "train.keep_last": 2,
  "train.final_eval_batches": 1,
  "optimizer.warmup_steps": 2,
  "mesh.data": 1,
  "report.ladder_megabytes": 0.0,
}


def write_corpus(directory: pathlib.Path) -> pathlib.Path:
  """Writes a folder of text files, which are the same each time, and returns it."""
  directory.mkdir(parents=True, exist_ok=True)
  draw = random.Random(0)
  for i in range(40):
    (directory / f"{i:02}.txt").write_text(" ".join(draw.choices(WORDS, k=60)) + "\n")
  return directory


def flags(home: pathlib.Path, **changes: Any) -> list[str]:
  """Returns the flags of the run on the corpus below `home`.

  Args:
    home: The folder that holds the corpus and the caches.
    **changes: Config keys to change, in which `__` stands for the dot.
  """
  keys = dict(KEYS) | {
    "data.sources": (f"text:{home / 'corpus'}/*.txt",),
    "data.cache_dir": str(home / "cache"),
  }
  keys |= {key.replace("__", "."): value for key, value in changes.items()}
  return ["--config=configs/base.py", *(f"--config.{key}={value}" for key, value in keys.items())]


def config(home: pathlib.Path, **changes: Any):
  """Returns the config of these flags, for a run in this process."""
  from experiments.common.entry import parse

  return parse(["train", *flags(home, **changes)], workdir=False).config


class Child:
  """A training process with the methods of `subprocess.Popen` that the tools need.

  It is forked from a server that has imported everything but has not asked for a device, which
  saves seconds at each start.
  """

  def __init__(
    self,
    home: pathlib.Path,
    argv: Sequence[str],
    log: pathlib.Path,
    patch: Callable[[], None] | None,
  ):
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(home / "compiled"))
    variables = {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": QUICK,
      "JAX_COMPILATION_CACHE_DIR": compiled,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.reliability.preload"])
    with _at_root(variables):
      self._process = context.Process(target=_train, args=(variables, list(argv), str(log), patch))
      self._process.start()

  def wait(self, seconds: float | None = None) -> int | None:
    """Waits for the end and returns the exit code, or None if `seconds` have passed."""
    self._process.join(seconds)
    return self._process.exitcode

  @property
  def pid(self) -> int:
    """The number of the process."""
    return self._process.pid

  def poll(self) -> int | None:
    """Returns the exit code, or None while the process runs."""
    return self._process.exitcode

  def kill(self) -> None:
    """Ends the process by SIGKILL."""
    self._process.kill()


@contextlib.contextmanager
def _at_root(variables: Mapping[str, str]) -> Iterator[None]:
  """Sets variables and the search path, which the server of forks inherits from the first child."""
  before = dict(os.environ)
  os.environ.update(variables | {"PYTHONPATH": str(ROOT)})
  try:
    yield
  finally:
    os.environ.clear()
    os.environ.update(before)


def _train(
  variables: Mapping[str, str], argv: Sequence[str], log: str, patch: Callable[[], None] | None
) -> None:
  """Runs the command in a child, with its output in `log`."""
  os.environ.update(variables)
  with open(log, "ab", buffering=0) as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  sys.stdout, sys.stderr = (
    open(1, "w", buffering=1, closefd=False),
    open(2, "w", buffering=1, closefd=False),
  )
  if patch:
    patch()
  from moe_jax import train

  sys.exit(train.main(argv))


def start(
  home: pathlib.Path,
  workdir: pathlib.Path,
  *extra: str,
  patch: Callable[[], None] | None = None,
  **changes: Any,
) -> Child:
  """Starts the run's command in a process of its own, whose output goes to `<workdir>.log`.

  Args:
    home: The folder that holds the corpus and the caches.
    workdir: The folder of the run.
    *extra: Further flags.
    patch: A function of a module that the child calls first, to break something.
    **changes: Config keys to change, in which `__` stands for the dot.
  """
  argv = ["train", f"--workdir={workdir}", *flags(home, **changes), *extra]
  return Child(home, argv, pathlib.Path(f"{workdir}.log"), patch)


def said(workdir: pathlib.Path) -> str:
  """Returns the last line of the run's output."""
  return (pathlib.Path(f"{workdir}.log").read_text(errors="replace").strip().splitlines() or [""])[
    -1
  ]


def sha256(workdir: pathlib.Path) -> str:
  """Returns the fingerprint of the weights of the run's last checkpoint."""
  from moe_jax import inspect

  return str(inspect.describe(workdir).get("parameters_sha256", "no checkpoint"))
