"""What a run leaves behind: final figures beside the ladder, a sample, a page of routed text, the
report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from moe_jax import accounts, data, sharding
from moe_jax.data.cache import cache_dir
from moe_jax.data.ladder import cached_ladder
from moe_jax.errors import ConfigError
from moe_jax.report import write_report
from moe_jax.training import evaluate, workdir
from moe_jax.training.interrupt import interruptible
from moe_jax.training.progress import working
from moe_jax.training.sample import next_logits, sample
from moe_jax.training.state import TrainState
from moe_jax.training.step import apply

ROOT = Path(__file__).resolve().parents[2]  # of the clone, which `report.compare` is relative to
SAMPLE_BYTES, TEMPERATURE, SAMPLE_SEED = 200, 0.8, 0
PAGE_TOKENS = 1024  # of each source, in routing.json


def finish(
  config,
  directory: Path,
  model: nn.Module,
  state: TrainState,
  tokenizer: data.Tokenizer,
  sources: Sequence[data.Source],
  mesh: Mesh,
  eval_fn: Callable[..., evaluate.Totals],
  run_info: Mapping[str, Any],
) -> dict[str, Any]:
  """Writes results.json, routing.json and report.html into the workdir, prints a table, and returns
  the results.

  All processes take part in evaluating and sampling; the first one writes and prints. Whatever
  takes long says now and then that it is at work. `train.final_eval_batches` and
  `report.ladder_megabytes` make it shorter. Ctrl-C and SIGTERM end it at once: the last checkpoint
  is saved already, and the same command begins with the finish again.

  Args:
    config: the run's; only `accounts` reads the model's part.
    directory: the workdir.
    eval_fn: see `evaluate.make_eval`.
    run_info: config (path), command, steps, tokens, wall_seconds; copied into the results.
  """
  with interruptible():
    return _finish(config, directory, model, state, tokenizer, sources, mesh, eval_fn, run_info)


def _finish(
  config, directory, model, state, tokenizer, sources, mesh, eval_fn, run_info
) -> dict[str, Any]:
  first = jax.process_index() == 0

  def at_work(what):
    return working(what, _say if first else lambda _: None)

  measure, _ = evaluate.MEASURES[config.data.objective]
  with at_work("evaluating the trained model on held-out text (train.final_eval_batches caps it)"):
    totals = evaluate.summary(eval_fn(state, config.train.final_eval_batches), measure)
  continues = config.data.objective == "next_token"
  variables = {"params": state.params} | (
    {"router_state": state.router_state} if state.router_state else {}
  )
  with (
    jax.set_mesh(mesh),
    sharding.use_rules(dict(config.sharding)),
    at_work("sampling and routing held-out text"),
  ):
    text = sample_text(config, model, variables, tokenizer) if continues else ""
    routing = routing_pages(config, model, variables, tokenizer, sources, mesh)
  if not first:
    return {}

  def of(prefix):
    return {s.name: totals[f"{prefix}/{s.name}"] for s in sources}

  size = data.vocab_size(config.data, tokenizer)
  total, activated = accounts.parameter_counts(config, size)
  ladder = {}
  for source in sources if continues else ():
    with at_work(
      f"n-gram models and LZMA of {source.name} (report.ladder_megabytes=0 leaves them out)"
    ):
      if rungs := source_ladder(config.data, source, round(config.report.ladder_megabytes * 1e6)):
        ladder[source.name] = rungs
  results = dict(run_info) | {
    "seed": config.seed,
    measure: of(measure),
    "loss": of("loss"),
    "ladder": ladder,
    "parameters": {"total": total, "activated": activated},
    "flops_per_token": accounts.flops_per_token(config, size),
    "data": data.fingerprints(sources),
    "hardware": workdir.hardware(mesh),
    "sample": text,
  }
  results |= {
    {"packages": "versions"}.get(name, name): value for name, value in workdir.versions().items()
  }
  results |= comparison(config.report.compare, results)
  workdir.write_json(directory / "results.json", _plain(results))
  (directory / "routing.json").unlink(missing_ok=True)
  if routing:
    workdir.write_atomically(directory / "routing.json", json.dumps(routing))
  path = write_report(directory)
  shown = f"sample, temperature {TEMPERATURE}:\n{text}\n\n" if continues else ""
  print(f"\n{table(results)}\n\n{shown}report: {path}", flush=True)
  return results


def _say(text: str) -> None:
  print(text, flush=True)


def sample_text(
  config, model: nn.Module, variables: Mapping[str, Any], tokenizer: data.Tokenizer
) -> str:
  """About `SAMPLE_BYTES` bytes that the model writes after the boundary, as a document's start."""
  window, allowed = config.data.seq_len, tokenizer.byte_lengths > 0
  count = math.ceil(SAMPLE_BYTES / np.median(tokenizer.byte_lengths[allowed]))
  rows = config.train.batch_size // config.train.accumulate_steps
  try:  # one row suffices, unless routing groups span several
    jax.eval_shape(
      lambda v: next_logits(model, v, np.zeros((1, window), np.int32), np.int32(1)), variables
    )
    rows = 1
  except ConfigError:
    pass
  ids = sample(
    model,
    variables,
    [tokenizer.boundary],
    count,
    jax.random.key(SAMPLE_SEED),
    TEMPERATURE,
    window=window,
    allowed=allowed,
    rows=rows,
  )
  return tokenizer.decode(ids[0])[:SAMPLE_BYTES].decode("utf-8", "replace")


def routing_pages(
  config,
  model: nn.Module,
  variables: Mapping[str, Any],
  tokenizer: data.Tokenizer,
  sources: Sequence[data.Source],
  mesh: Mesh,
) -> dict[str, Any]:
  """The first validation tokens of each source with each token's first-choice expert, for the
  report; {} if dense.

  In an encoder-decoder they are the encoder's tokens and layers.

  Returns:
    {"num_experts": E, "layers": [index of each of the Lm layers with experts], "pages": [{"source",
     "pieces": [text, or None for a special token], "experts": [[expert] * tokens] * Lm}]};
    an expert of E means nobody.
  """

  def routed(variables, batch):
    _, aux = apply(model, variables, batch, train=False, return_routing=True)
    tokens, prefix = ("encoder_tokens", "encoder_") if "encoder_tokens" in batch else ("inputs", "")
    seen = {"inputs": batch[tokens], "segment_ids": batch[f"{prefix}segment_ids"]}
    found = {"top1_expert": f"{prefix}top1_expert", "load": "load"}
    return seen | {name: aux.metrics[key] for name, key in found.items() if key in aux.metrics}

  routed = jax.jit(routed, out_shardings=sharding.replicated(mesh))
  rows, pages, experts = config.train.batch_size // config.train.accumulate_steps, [], 0
  index, count = sharding.reader(mesh)
  for source in sources:
    batch = next(
      iter(
        data.validation_batches(
          config.data, tokenizer, source, rows, process_index=index, process_count=count
        )
      ),
      None,
    )
    if batch is None:
      continue
    seen = jax.tree.map(np.asarray, routed(variables, evaluate.put(mesh, batch)))
    if "top1_expert" not in seen:
      return {}
    real = np.flatnonzero(seen["segment_ids"].ravel() > 0)[:PAGE_TOKENS]
    chosen = seen["top1_expert"].reshape(len(seen["top1_expert"]), -1)[:, real]
    pages.append(
      {
        "source": source.name,
        "pieces": pieces(tokenizer, seen["inputs"].ravel()[real]),
        "experts": chosen.tolist(),
      }
    )
    experts = seen["load"].shape[-1]
  experts_of = getattr(model, "encoder_experts", getattr(model, "has_experts", ()))
  layers = [i for i, has_experts in enumerate(experts_of) if has_experts]
  return {"num_experts": experts, "layers": layers, "pages": pages} if pages else {}


def pieces(tokenizer: data.Tokenizer, ids: np.ndarray) -> list[str | None]:
  """The text that each token stands for, with `\\xe2` for bytes that are not UTF-8 by themselves;
  None for specials."""
  ids = np.asarray(ids)
  lengths = np.append(tokenizer.byte_lengths, 0)[
    np.minimum(ids, len(tokenizer.byte_lengths))
  ]  # 0 of sentinels
  text = tokenizer.decode(ids)
  ends = np.cumsum(lengths)
  if len(text) == lengths.sum():
    found = [text[end - length : end] for end, length in zip(ends, lengths, strict=True)]
  else:  # a tokenizer that trims what it decodes
    found = [tokenizer.decode([i]) for i in ids]
  return [
    piece.decode("utf-8", "backslashreplace") if length else None
    for piece, length in zip(found, lengths, strict=True)
  ]


def source_ladder(settings, source: data.Source, most: int) -> dict[str, float] | None:
  """The ladder of a source (see `data/ladder.py`); None if its text is large or its validation
  split empty.

  Args:
    settings: `config.data`.
    source: of text.
    most: bytes of training text, and of validation text, above which there is no ladder.
  """
  if not most:
    return None

  def documents():
    train, validation = (_up_to(source.documents(split), most) for split in ("train", "validation"))
    return (train, validation) if train is not None and validation and any(validation) else None

  key = f"{source.fingerprint} {settings.validation_fraction} {settings.validation_split}"
  return cached_ladder(key, documents, cache_dir(settings.cache_dir))


def comparison(path: str, results: Mapping[str, Any]) -> dict[str, Any]:
  """{"compare": {"label", MEASURE, "other_data"}} of another run's results.json; {} if there is
  none to read.

  Args:
    path: relative to the clone or, failing that, to the working directory; "" = none.
    results: this run's; sources whose text differs from theirs are listed in `other_data`.
  """
  measure, _ = measure_of(results)
  if not path:
    return {}
  place = next((p for p in (ROOT / path, Path(path)) if p.is_file()), None)
  try:
    other = json.loads(place.read_text() if place else "null")
    name = Path(str(other["config"]).partition(":")[0]).stem.replace("_", " ")
    scores = {
      s: float(other[measure][s]) for s in results[measure] if other[measure].get(s) is not None
    }
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    print(
      f"report.compare={path!r}: no results of a run there, so there is nothing to compare with",
      flush=True,
    )
    return {}
  theirs = other.get("data") or {}
  differ = [s for s in scores if theirs.get(s) != results["data"].get(s)]
  return {"compare": {"label": name, measure: scores, "other_data": differ}}


def measure_of(results: Mapping[str, Any]) -> tuple[str, str]:
  """The one of `evaluate.MEASURES` that results hold."""
  return next((name, words) for name, words in evaluate.MEASURES.values() if name in results)


def table(results: Mapping[str, Any]) -> str:
  """The run's measure: a line for each source; this run, the compared one, the ladder."""
  compare, (measure, words) = results.get("compare", {}), measure_of(results)
  rungs = list(dict.fromkeys(rung for ladder in results["ladder"].values() for rung in ladder))
  head = [words, "this run", *([compare["label"]] if compare else []), *rungs]
  lines = [[name.upper() if name == "lzma" else name for name in head]]
  for source, value in results[measure].items():
    other = [compare[measure].get(source)] if compare else []
    ladder = results["ladder"].get(source, {})
    cells = [_cell(x) for x in [value, *other, *(ladder.get(rung) for rung in rungs)]]
    if source in compare.get("other_data", ()):
      cells[1] += "*"
    lines.append([source, *cells])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = "\n".join(
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )
  return text + ("\n* on another version of this text" if compare.get("other_data") else "")


def _cell(value: float | None) -> str:
  return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _up_to(documents, limit: int) -> list[bytes] | None:
  """All of the documents; None if they hold more than `limit` bytes."""
  found, size = [], 0
  for document in documents:
    size += len(document)
    if size > limit:
      return None
    found.append(document)
  return found


def _plain(value):
  """JSON has no NaN: None stands for what is not finite."""
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  return None if isinstance(value, float) and not math.isfinite(value) else value
