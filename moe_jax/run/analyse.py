"""Analysis of the experts of a trained model on text of several domains."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from moe_jax import data, sharding
from moe_jax.analysis.kinds import KINDS, kinds_of
from moe_jax.analysis.recorded import Recorded
from moe_jax.analysis.results import analyse as analyse_recorded
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError, choose
from moe_jax.report.analysis_page import analysis_page
from moe_jax.run import routed
from moe_jax.run.evaluate import SPLITS, open_source, placed
from moe_jax.run.load import LoadedRun, load_run
from moe_jax.training import workdir
from moe_jax.training.options import TrainOptions
from moe_jax.training.progress import working

TOKENS = 32_768  # of each domain
FILES = ("analysis.html", "analysis.json")


def analyse(
  run: str | os.PathLike | LoadedRun,
  sources: Sequence[str] = (),
  *,
  split: str = "",
  tokens: int = TOKENS,
  batch_size: int = 0,
  step: int | None = None,
  against: LoadedRun | None = None,
  mesh: Mapping[str, int] | None = None,
  to: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """Returns what the experts of a trained model specialise in, and writes a page about it.

  Text is cut into rows and routed as in `evaluate`. An expert is a token's choice before capacity.

  Args:
    run: The --workdir of a run, or what `load_run` returned.
    sources: Sources as in `data.sources`, each of which is a domain. () means those of the run.
    split: As for `evaluate`.
    tokens: About the number of tokens that are read of each domain, spread over it. 0 means all.
    batch_size: The number of rows of a batch; 0 means that of a microbatch in training. It matters
      for routers whose groups span several rows.
    step: The step of the checkpoint. None means the newest one.
    against: Another checkpoint of the same model, for the churn between the two.
    mesh: The size of each axis of the mesh that is not 1. None means one device.
    to: A folder, which is made if it does not exist, for analysis.html and analysis.json, which
      must not exist in it. None means that nothing is written.

  Returns:
    A dict with "run", "step", "against" (a step, or None) and "stacks": for "decoder" and, if the
    model has an encoder, "encoder", the statistics that `analysis.results.analyse` describes.

  Raises:
    ConfigError: The run, a source, the mesh or the folder is wrong; the model has no experts, or no
      choice of experts (Soft MoE); or the two checkpoints are not of the same model.
  """
  if split:
    choose("split", split, SPLITS)
  for name, value in (("tokens", tokens), ("batch_size", batch_size)):
    if value < 0:
      raise ConfigError(name, value, "must be at least 0")
  folder = None if to is None else destination(to)
  loaded = run if isinstance(run, LoadedRun) else load_run(run, step)
  options = DataOptions.of(loaded.config.data)
  tokenizer = data.tokenizer_of(options)
  opened = [open_source(name, options, split) for name in sources or options.sources]
  _check(loaded, against, tokenizer)
  rows = batch_size or TrainOptions.of(loaded.config.train).microbatch
  batches = math.ceil(tokens / (rows * _row_length(options)))
  devices = sharding.make_mesh({"data": 1} | dict(mesh or {}))
  recorded = _record(loaded, opened, tokenizer, rows, batches, devices)
  before = {}
  if against is not None:
    earlier = _record(against, opened, tokenizer, rows, batches, devices)
    before = {stack: each.first for stack, each in earlier.items()}
  with working("computing statistics", _say):
    results = {stack: analyse_recorded(each, before.get(stack)) for stack, each in recorded.items()}
  summary = {
    "run": loaded.name,
    "step": loaded.step,
    "against": None if against is None else against.step,
    "stacks": results,
  }
  if folder is not None:
    folder.mkdir(exist_ok=True)
    stacks = {stack: (each, results[stack]) for stack, each in recorded.items()}
    page = analysis_page(loaded.name or "run", _facts(summary), stacks)
    workdir.write_atomically(folder / "analysis.html", page)
    workdir.write_atomically(folder / "analysis.json", json.dumps(summary, allow_nan=False))
  return summary


def destination(to: str | os.PathLike) -> pathlib.Path:
  """Returns the folder for the page.

  Raises:
    ConfigError: It cannot be a folder, or it holds a page already.
  """
  folder = pathlib.Path(to)
  if not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
    raise ConfigError("to", str(to), "is no folder and cannot become one; name another folder")
  for name in FILES:
    if (folder / name).exists():
      raise ConfigError("to", str(to), f"has an {name} already; name another folder, or move it")
  return folder


def _row_length(options: DataOptions) -> int:
  """Returns the number of tokens of a row, of an encoder if there is one."""
  return options.seq_len if options.objective == "next_token" else options.encoder_len


def _check(loaded: LoadedRun, against: LoadedRun | None, tokenizer: data.Tokenizer) -> None:
  """Raises ConfigError if the model has no experts, or the other one is not like it."""
  layers = routed.expert_layers(loaded.model)
  if not any(layers.values()):
    raise ConfigError(
      "workdir", loaded.name, "is a run without experts; name a run whose model has some"
    )
  if against is None:
    return
  other = data.tokenizer_of(DataOptions.of(against.config.data))

  def shapes(variables):
    return jax.tree.map(np.shape, variables)

  if other.fingerprint != tokenizer.fingerprint or (
    shapes(against.variables) != shapes(loaded.variables)
  ):
    raise ConfigError(
      "against", against.name, "is a checkpoint of another model; name one of the same run"
    )


def _record(
  loaded: LoadedRun,
  opened: Sequence[tuple[DataOptions, data.Source]],
  tokenizer: data.Tokenizer,
  batch_size: int,
  num_batches: int,
  mesh: jax.sharding.Mesh,
) -> dict[str, Recorded]:
  """Returns the tokens of all domains and their routing, for each stack with experts."""
  route, state = routed.make_route(loaded.model, mesh), placed(loaded, mesh)
  variables = {"params": state.params} | (
    {"router_state": state.router_state} if state.router_state else {}
  )
  parts: dict[str, list[dict[str, np.ndarray]]] = {}
  texts: dict[str, list[str | None]] = {}
  start = 0
  # A text may have fewer batches than are wanted of it.
  total = num_batches * len(opened) or None
  is_terminal = sys.stderr.isatty()
  with (
    jax.set_mesh(mesh),
    sharding.use_rules(dict(loaded.config.sharding)),
    working("routing text", _say if not is_terminal else lambda _: None),
    tqdm.tqdm(
      total=total, desc="routing text", unit=" batches", delay=3, disable=not is_terminal
    ) as bar,
  ):
    for domain, (options, source) in enumerate(opened):
      for stacks in routed.routed_batches(
        route, variables, options, tokenizer, source, batch_size, num_batches, mesh
      ):
        for stack, arrays in stacks.items():
          if "second" not in arrays:
            raise ConfigError(
              "workdir",
              loaded.name,
              "has layers of Soft MoE, whose experts read averages of all tokens, so that no token "
              "has an expert; name a run with another router",
            )
          parts.setdefault(stack, []).append(_tokens(arrays, domain, start))
          texts.setdefault(stack, []).extend(_pieces(arrays, tokenizer))
        start += batch_size
        bar.update()
  layers = routed.expert_layers(loaded.model)
  domains = [source.name for _, source in opened]
  return {
    stack: _joined(parts[stack], texts[stack], layers[stack], domains, tokenizer.size)
    for stack in routed.STACKS
    if stack in parts
  }


def _tokens(arrays: Mapping[str, np.ndarray], domain: int, start: int) -> dict[str, np.ndarray]:
  """Returns the arrays of `Recorded` for the real tokens of a batch whose first row is `start`."""
  segments = arrays["segment_ids"]
  is_real = segments > 0
  follows = np.zeros_like(is_real)
  follows[:, 1:] = (segments[:, 1:] == segments[:, :-1]) & is_real[:, 1:]
  row = start + np.broadcast_to(np.arange(len(segments))[:, None], segments.shape)
  by_layer = {name: arrays[name][:, is_real] for name in ("first", "second", "entropy", "top")}
  return by_layer | {
    "ids": arrays["tokens"][is_real],
    "domain": np.full(is_real.sum(), domain),
    "row": row[is_real],
    "follows": follows[is_real],
    "experts": arrays["experts"],
  }


def _pieces(arrays: Mapping[str, np.ndarray], tokenizer: data.Tokenizer) -> list[str | None]:
  """Returns the texts of the real tokens of a batch."""
  rows = zip(arrays["tokens"], arrays["segment_ids"] > 0, strict=True)
  return [
    piece
    for tokens, is_real in rows
    if is_real.any()
    for piece in routed.pieces(tokenizer, tokens[is_real])
  ]


def _joined(
  parts: Sequence[Mapping[str, np.ndarray]],
  pieces: Sequence[str | None],
  layers: Sequence[int],
  domains: Sequence[str],
  vocab_size: int,
) -> Recorded:
  """Returns the parts of a stack as one `Recorded`; ids beyond the vocabulary are sentinels."""
  num_experts = len(parts[0]["experts"])
  arrays = {
    name: np.concatenate([part[name] for part in parts], axis=-1)
    for name in parts[0]
    if name != "experts"
  }
  is_sentinel = arrays["ids"] >= vocab_size
  kind = np.where(is_sentinel, KINDS.index("sentinel"), kinds_of(pieces))
  names = [f"layer {i}" for i in layers]
  return Recorded(
    layers=names, domains=domains, num_experts=num_experts, pieces=pieces, kind=kind, **arrays
  )


def _facts(summary: Mapping[str, Any]) -> list[str]:
  """Returns what was analysed, in a few words each."""
  results = next(iter(summary["stacks"].values()))
  counts = ", ".join(
    f"{domain} {tokens:,}"
    for domain, tokens in zip(results["domains"], results["tokens"], strict=True)
  )
  return [
    f"step {summary['step']}",
    *([] if summary["against"] is None else [f"churn from step {summary['against']}"]),
    f"{results['num_experts']} experts in {len(results['layers'])} layers",
    f"tokens: {counts}",
  ]


def _say(text: str) -> None:
  """Prints a line about long work at once."""
  print(text, file=sys.stderr, flush=True)
