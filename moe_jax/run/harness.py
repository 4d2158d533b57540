"""An adapter for lm-evaluation-harness (the extra `eval`), which runs tasks on a trained model."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.errors import ConfigError
from moe_jax.run.generate import generate
from moe_jax.run.load import LoadedRun
from moe_jax.run.scores import continuations, documents
from moe_jax.run.text_model import TextModel, text_model


def evaluate_tasks(
  run: str | os.PathLike | LoadedRun | TextModel,
  tasks: Sequence[str],
  *,
  task_folder: str | os.PathLike | None = None,
  num_fewshot: int | None = None,
  limit: int | None = None,
  batch_size: int = 8,
  step: int | None = None,
  mesh: Mapping[str, int] | None = None,
) -> dict[str, dict[str, Any]]:
  """Runs tasks of lm-evaluation-harness on a trained model.

  Args:
    run: See `generate`.
    tasks: Names of tasks, of the harness or of `task_folder`.
    task_folder: A folder with task files of one's own, as `--include_path` of the harness. With it,
      only tasks of this folder are known, and nothing is downloaded unless they ask for it.
    num_fewshot: The number of examples before each question; None means that of the task.
    limit: The number of documents of each task that are used; None means all.
    batch_size: The number of texts that are scored at once.
    step: The step of the checkpoint. None means the newest one.
    mesh: The size of each axis of the mesh that is not 1. None means one device.

  Returns:
    Task -> measure -> value, as the harness reports them ("acc,none", "acc_stderr,none", ...).

  Raises:
    ConfigError: The harness is not installed, a task or a folder does not exist, or `text_model`
      refuses the run.
  """
  folder = None if task_folder is None else pathlib.Path(task_folder)
  if folder is not None and not folder.is_dir():
    raise ConfigError("task_folder", str(folder), "there is no such folder; name one of task files")
  try:
    # The extra is not installed where types are checked.
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ConfigError(
      "tasks",
      ",".join(tasks),
      "need lm-evaluation-harness; install it from the clone: pip install -e '.[eval]'",
    ) from error
  manager = TaskManager(
    include_path=None if folder is None else str(folder), include_defaults=folder is None
  )
  unknown = [name for name in tasks if name not in manager.all_tasks]
  if unknown or not tasks:
    known = ", ".join(sorted(manager.all_tasks)[:20])
    raise ConfigError("tasks", ",".join(unknown), f"there is no such task; some are: {known}")
  results = lm_eval.simple_evaluate(
    model=adapter(text_model(run, step, mesh), batch_size),
    tasks=list(tasks),
    task_manager=manager,
    num_fewshot=num_fewshot,
    limit=limit,
    # The confidence intervals of some measures would be drawn 100,000 times.
    bootstrap_iters=1000,
    log_samples=False,
  )
  return {} if results is None else results["results"]


def adapter(text: TextModel, batch_size: int = 8) -> Any:
  """Returns the model as an `lm_eval.api.model.LM`, for programs that call the harness themselves.

  Args:
    text: The model.
    batch_size: The number of texts that are scored, or continued, at once.
  """
  # The harness is imported only here, because few users have it and its import takes seconds.
  from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

  class Adapter(LM):
    """Answers the three kinds of requests of the harness."""

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
      return continuations(text, [request.args for request in requests], batch_size)

    def loglikelihood_rolling(self, requests) -> list[float]:
      return documents(text, [request.args[0] for request in requests], batch_size)

    def generate_until(self, requests) -> list[str]:
      return _generate_until(text, [request.args for request in requests], batch_size)

  return Adapter()


def _generate_until(
  text: TextModel, requests: Sequence[tuple[str, Mapping[str, Any]]], batch_size: int
) -> list[str]:
  """Returns the text after each context; requests with equal options are answered together."""
  by_options: dict[tuple[Any, ...], list[int]] = {}
  for number, (_, options) in enumerate(requests):
    by_options.setdefault(_options(options), []).append(number)
  answers = [""] * len(requests)
  for (stop, max_tokens, temperature, top_k, top_p), numbers in by_options.items():
    for start in range(0, len(numbers), batch_size):
      batch = numbers[start : start + batch_size]
      written = generate(
        text,
        [requests[number][0] for number in batch],
        stop=stop,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
      )
      for number, answer in zip(batch, written, strict=True):
        answers[number] = answer
  return answers


def _options(options: Mapping[str, Any]) -> tuple[tuple[str, ...], int, float, int, float]:
  """Returns (stop, max_tokens, temperature, top_k, top_p) of the harness's generation options.

  Its names are those of transformers. Without `do_sample` or a temperature, decoding is greedy.
  """
  until = options.get("until") or ()
  stop = (until,) if isinstance(until, str) else tuple(until)
  samples = options.get("do_sample", options.get("temperature", 0) > 0)
  return (
    tuple(each for each in stop if each),
    int(options.get("max_gen_toks", 256)),
    float(options.get("temperature", 1.0)) if samples else 0.0,
    int(options.get("top_k", 0)) if samples else 0,
    float(options.get("top_p", 1.0)) if samples else 1.0,
  )
