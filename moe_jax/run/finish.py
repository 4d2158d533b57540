"""The end of a run: the final results beside the ladder, a sample, routed text, and the report."""

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

from moe_jax import accounts, assembly, data, sharding
from moe_jax.data.cache import cache_dir
from moe_jax.data.ladder import cached_ladder
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError
from moe_jax.generation import Sampling, generate_tokens
from moe_jax.report import write_report
from moe_jax.run import routed
from moe_jax.training import evaluate, workdir
from moe_jax.training.interrupt import interruptible
from moe_jax.training.options import TrainOptions
from moe_jax.training.progress import working
from moe_jax.training.state import TrainState

# The root of the clone, to which `report.compare` is relative.
ROOT = Path(__file__).resolve().parents[2]
SAMPLE_BYTES, TEMPERATURE, SAMPLE_SEED = 200, 0.8, 0
# The number of tokens of each source in routing.json.
PAGE_TOKENS = 1024


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
  """Writes the results and the report into the workdir, prints a table, and returns the results.

  The files are results.json, routing.json and report.html. All processes take part in evaluating
  and sampling; only the first one writes and prints. Long operations report at intervals that they
  are at work. `train.final_eval_batches` and `report.ladder_megabytes` make them shorter. Ctrl-C
  and SIGTERM end this function at once. That loses nothing, because the last checkpoint is saved
  already and the same command begins with this function again.

  Args:
    config: The config of the run. Only `accounts` and `assembly` read its section `model`.
    directory: The workdir.
    model: The model.
    state: The state after the last step.
    tokenizer: The tokenizer of the data.
    sources: The sources of the data.
    mesh: The mesh on which the state lives.
    eval_fn: The function that `evaluate.make_eval` returns.
    run_info: Entries that are copied into the results: config (path), command, steps, tokens and
      wall_seconds.

  Returns:
    The content of results.json. On all processes but the first it is {}.
  """
  with interruptible():
    return _finish(config, directory, model, state, tokenizer, sources, mesh, eval_fn, run_info)


def _finish(
  config, directory, model, state, tokenizer, sources, mesh, eval_fn, run_info
) -> dict[str, Any]:
  """Does the work of `finish`."""
  first = jax.process_index() == 0
  data_options = DataOptions.of(config.data)
  train_options = TrainOptions.of(config.train)

  def at_work(what):
    return working(what, _say if first else lambda _: None)

  measure, _ = evaluate.MEASURES[data_options.objective]
  with at_work("evaluating the trained model on held-out text (train.final_eval_batches caps it)"):
    totals = evaluate.summary(eval_fn(state, train_options.final_eval_batches), measure)
  # Only a model of the next token can continue a text.
  continues = data_options.objective == "next_token"
  no_sample = ""
  try:
    assembly.check_decoding(config)
  except ConfigError as error:
    no_sample = f"no sample: {error}"
  variables = {"params": state.params} | (
    {"router_state": state.router_state} if state.router_state else {}
  )
  with (
    jax.set_mesh(mesh),
    sharding.use_rules(dict(config.sharding)),
    at_work("sampling and routing held-out text"),
  ):
    sampled = ""
    if continues and not no_sample:
      sampled = sample_text(model, variables, tokenizer, data_options.seq_len)
    routing = routing_pages(
      data_options, train_options.microbatch, model, variables, tokenizer, sources, mesh
    )
  if not first:
    return {}

  def by_source(prefix):
    return {s.name: totals[f"{prefix}/{s.name}"] for s in sources}

  size = data.vocab_size(data_options, tokenizer)
  total, activated = accounts.parameter_counts(config, size)
  ladder = {}
  for source in sources if continues else ():
    with at_work(
      f"n-gram models and LZMA of {source.name} (report.ladder_megabytes=0 leaves them out)"
    ):
      if rungs := source_ladder(data_options, source, round(config.report.ladder_megabytes * 1e6)):
        ladder[source.name] = rungs
  results = dict(run_info) | {
    "seed": config.seed,
    measure: by_source(measure),
    "loss": by_source("loss"),
    "ladder": ladder,
    "parameters": {"total": total, "activated": activated},
    "flops_per_token": accounts.flops_per_token(config, size),
    "data": data.fingerprints(sources),
    "hardware": workdir.hardware(mesh),
    "sample": sampled,
  }
  # results.json has the packages under the name "versions".
  results |= {
    {"packages": "versions"}.get(name, name): value for name, value in workdir.versions().items()
  }
  results |= comparison(config.report.compare, results)
  workdir.write_json(directory / "results.json", _plain(results))
  (directory / "routing.json").unlink(missing_ok=True)
  if routing:
    workdir.write_atomically(directory / "routing.json", json.dumps(routing))
  path = write_report(directory)
  workdir.note_end(directory)
  shown = no_sample or f"sample, temperature {TEMPERATURE}:\n{sampled}"
  shown = f"{shown}\n\n" if continues else ""
  print(f"\n{table(results)}\n\n{shown}report: {path}", flush=True)
  return results


def show_end(directory: Path) -> None:
  """Prints the results of a run that has ended (`workdir.has_ended`), and where its report is.

  A report that is missing or cut is written anew.
  """
  results, path = json.loads((directory / "results.json").read_text()), directory / "report.html"
  if not (path.is_file() and path.read_bytes().rstrip().endswith(b"</html>")):
    path = write_report(directory)
  print(
    f"the run in {directory} has finished its {results['steps']:,} steps; a larger train.steps "
    f"goes on from there\n\n{table(results)}\n\nreport: {path}",
    flush=True,
  )


def _say(text: str) -> None:
  """Prints a line at once."""
  print(text, flush=True)


def sample_text(
  model: nn.Module, variables: Mapping[str, Any], tokenizer: data.Tokenizer, window: int
) -> str:
  """Returns about `SAMPLE_BYTES` bytes that the model writes as the beginning of a document.

  Args:
    model: The model.
    variables: Its variables.
    tokenizer: The tokenizer of the data.
    window: The number of tokens of a row in training. After as many tokens, the model goes on from
      the last of them, at least a quarter, so that no position is larger than in training.
  """
  allowed = tokenizer.byte_lengths > 0
  count = math.ceil(SAMPLE_BYTES / np.median(tokenizer.byte_lengths[allowed]))
  keys = jax.random.split(jax.random.key(SAMPLE_SEED), count)
  pieces = _pieces(count, window)
  # All pieces have the shapes of the longest, so that one program draws them. It also draws tokens
  # that nobody reads.
  room, at_most = (max(lengths) for lengths in zip(*pieces, strict=True))
  drawn = [tokenizer.boundary]
  for length, more in pieces:
    begun = len(drawn) - 1
    ids = generate_tokens(
      model,
      variables,
      [drawn[-length:]],
      keys[np.arange(begun, begun + at_most) % count],
      Sampling(TEMPERATURE),
      allowed=allowed,
      room=room,
    )
    drawn += ids[0, :more].tolist()
  return tokenizer.decode(drawn[1:])[:SAMPLE_BYTES].decode("utf-8", "replace")


def _pieces(count: int, window: int) -> list[tuple[int, int]]:
  """Returns the lengths of the context and of the new tokens of each piece of a sample.

  The first context is the boundary. Later ones are at least a quarter of the window, and more if
  fewer new tokens are left. A context and its new tokens but the last, which is not read, fit into
  the window.

  Args:
    count: The number of tokens of the sample.
    window: The number of tokens of a row in training.
  """
  pieces, length = [], 1
  while count:
    more = min(count, window + 1 - length)
    pieces.append((length, more))
    count -= more
    length = window + 1 - min(count, window - window // 4)
  return pieces


def routing_pages(
  options: DataOptions,
  batch_size: int,
  model: nn.Module,
  variables: Mapping[str, Any],
  tokenizer: data.Tokenizer,
  sources: Sequence[data.Source],
  mesh: Mesh,
) -> dict[str, Any]:
  """Returns the first validation tokens of each source, with their experts, for the report.

  The expert of a token is its first choice. In an encoder-decoder the tokens and layers are those
  of the encoder.

  Args:
    options: The options of the data.
    batch_size: The number of rows of a batch, over all processes.
    model: The model.
    variables: Its variables.
    tokenizer: The tokenizer of the data.
    sources: The sources of the data.
    mesh: The mesh on which the variables live.

  Returns:
    A dict, which is {} if the model has no routed layers:
      num_experts: The number of experts E.
      layers: The index of each of the Lm layers with experts.
      pages: A dict for each source, with the entries
        source: The name of the source.
        pieces: The text of each token, or None for a special token.
        experts: The expert of each token in each layer, [Lm][tokens]. E means no expert.
        second: The second choice, likewise, if any token has one.
  """
  route = routed.make_route(model, mesh)
  layers = routed.expert_layers(model)
  stack = "encoder" if "encoder" in layers else "decoder"
  pages, experts = [], 0
  for source in sources:
    batches = routed.routed_batches(
      route, variables, options, tokenizer, source, batch_size, 0, mesh
    )
    stacks = next(batches, None)
    if stacks is None:
      continue
    if stack not in stacks:
      return {}
    shown = stacks[stack]
    real = np.flatnonzero(shown["segment_ids"].ravel() > 0)[:PAGE_TOKENS]
    chosen = shown["first"].reshape(len(shown["first"]), -1)[:, real]
    experts = len(shown["experts"])
    page = {
      "source": source.name,
      "pieces": routed.pieces(tokenizer, shown["tokens"].ravel()[real]),
      "experts": chosen.tolist(),
    }
    if "second" in shown:
      second = shown["second"].reshape(len(shown["second"]), -1)[:, real]
      # With one expert a token there is none.
      page |= {"second": second.tolist()} if np.any(second < experts) else {}
    pages.append(page)
  return {"num_experts": experts, "layers": layers[stack], "pages": pages} if pages else {}


def source_ladder(options: DataOptions, source: data.Source, most: int) -> dict[str, float] | None:
  """Returns the bits per byte of n-gram models and LZMA on a source (see `data/ladder.py`).

  Args:
    options: The options of the data.
    source: The source of text.
    most: The largest number of bytes of training text, and of validation text, for which the ladder
      is computed. 0 means that there is no ladder.

  Returns:
    Name of the baseline -> bits per byte of the validation split, or None if the text is larger
    than `most` or the validation split is empty.
  """
  if not most:
    return None

  def documents():
    train, validation = (_up_to(source.documents(split), most) for split in ("train", "validation"))
    return (train, validation) if train is not None and validation and any(validation) else None

  key = f"{source.fingerprint} {options.validation_fraction} {options.validation_split}"
  return cached_ladder(key, documents, cache_dir(options.cache_dir))


def comparison(path: str, results: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the results of another run, as an entry of this run's results.

  Args:
    path: The other run's results.json, relative to the clone or else to the working directory. ""
      means that there is no other run.
    results: The results of this run.

  Returns:
    `{"compare": {"label", "about", MEASURE, "other_data"}}`, where `about` says in a sentence what
    run it is, and `other_data` lists the sources whose text differs between the runs; {} if there
    are no results to read, or if they are of other sources, as with data of the user's own.
  """
  measure, _ = measure_of(results)
  if not path:
    return {}
  file = next((p for p in (ROOT / path, Path(path)) if p.is_file()), None)
  try:
    other = json.loads(file.read_text() if file else "null")
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
  if not scores:
    return {}
  after = f" after {other['steps']:,} steps" if isinstance(other.get("steps"), int) else ""
  about = f"{name}: what {other['config']} reached{after}, read from {path} (report.compare)."
  other_fingerprints = other.get("data") or {}
  different = [s for s in scores if other_fingerprints.get(s) != results["data"].get(s)]
  return {"compare": {"label": name, "about": about, measure: scores, "other_data": different}}


def measure_of(results: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the one of `evaluate.MEASURES` that the results hold: its name, and its unit."""
  return next((name, words) for name, words in evaluate.MEASURES.values() if name in results)


def table(results: Mapping[str, Any]) -> str:
  """Returns a table of the run's measure.

  It has a line for each source, and columns for this run, the run to compare with, and the ladder.
  A sentence below says what run it is compared with.
  """
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
  notes = ["* on another version of this text"] if compare.get("other_data") else []
  notes += [compare["about"]] if compare else []
  return "\n".join([text, *notes])


def _cell(value: float | None) -> str:
  """Returns a number with three decimals, or "-" if there is none that is finite."""
  return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _up_to(documents, limit: int) -> list[bytes] | None:
  """Returns all of the documents, or None if they hold more than `limit` bytes."""
  collected, size = [], 0
  for document in documents:
    size += len(document)
    if size > limit:
      return None
    collected.append(document)
  return collected


def _plain(value):
  """Returns a value with None for numbers that are not finite, because JSON has no NaN."""
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  return None if isinstance(value, float) and not math.isfinite(value) else value
