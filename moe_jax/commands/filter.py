"""Filters a corpus by quality, fluency and likeness to advertising, into a JSONL file.

  python -m moe_jax filter --source=SOURCE --curated=SOURCE --out=FILE.jsonl

Sources are named as in data.sources: text:GLOB, jsonl:GLOB, embedded:NAME or tfds:NAME. Train on
the result with --config.data.sources="('jsonl:FILE.jsonl',)".

  --source=SOURCE        the text to filter
  --curated=SOURCE       examples of good text
  --out=FILE             the JSONL file to write, which must not exist
  --alpha=A              GLaM's quality filter keeps a document of score s in [0, 1] with the
                         probability (2 - s)**-A (default: 9, as GPT-3); 0 leaves it out
  --fluency=SHARE        drops this share as least fluent (default: 0; LLaMA-MoE v2: 0.15)
  --advertising=SOURCE   examples of advertising
  --drop_advertising=SHARE  drops this share as most like advertising (default: 0.5)
  --text_field=NAME      the field of JSONL lines and TFDS examples with the text (default: text)
  --seed=N               seed of the quality filter's draws (default: 0)

A table says how many documents and bytes each stage has kept, and how well its classifier tells the
examples from the source: the area under the ROC curve on documents that it was not fitted to.
"""

from __future__ import annotations

import math
import os
import pathlib
import secrets
import sys
from collections.abc import Sequence

from moe_jax.commands.config_file import expand
from moe_jax.commands.flags import Flag, number, positional, take_flags
from moe_jax.commands.guarded import guarded
from moe_jax.errors import ConfigError, whole

FLAGS = tuple(
  map(
    Flag,
    (
      "source",
      "curated",
      "out",
      "alpha",
      "fluency",
      "advertising",
      "drop_advertising",
      "text_field",
      "seed",
    ),
  )
)


def main(argv: Sequence[str]) -> int:
  """Filters, prints what each stage has kept, and returns the exit code."""
  return guarded(argv, __doc__, lambda rest: _filter(rest[1:]))


def _filter(args: Sequence[str]) -> int:
  """Does what the arguments say."""
  flags, rest = take_flags(args, FLAGS, config=False)
  positional(rest, ())
  for name in ("source", "out"):
    if not flags.get(name):
      raise ConfigError(name, None, f"is missing; give --{name}=...")
  alpha = number("alpha", flags.get("alpha", "9"))
  if alpha < 0:
    raise ConfigError("alpha", alpha, "must be above 0, or 0 for no filter by quality")
  fluency = _share("fluency", flags.get("fluency", "0"))
  advertising = _share("drop_advertising", flags.get("drop_advertising", "0.5"))
  seed = whole("seed", flags.get("seed", "0"), low=0, high=2**32 - 1)
  if (alpha or fluency) and "curated" not in flags:
    raise ConfigError(
      "curated", None, "is missing; give --curated=SOURCE with good text, or --alpha=0"
    )
  if not (alpha or fluency or "advertising" in flags):
    raise ConfigError(
      "alpha", 0, "leaves nothing to do; give --fluency=SHARE or --advertising=SOURCE"
    )
  out = expand("out", flags["out"])
  if out.exists() or not out.parent.is_dir():
    problem = "exists already; name a new file" if out.exists() else "lies in no folder; make it"
    raise ConfigError("out", str(out), problem)
  # Imported here, so that mistakes of the command line are told at once.
  from tqdm import tqdm

  from moe_jax.data import filters

  field = flags.get("text_field", "text")
  corpus = _documents(flags["source"], field)
  curated = _documents(flags["curated"], field) if alpha or fluency else None
  ads = _documents(flags["advertising"], field) if "advertising" in flags else None
  settings = filters.Settings(advertising if ads else 0.0, fluency, alpha or None, seed)
  print(f"fitting to examples, then scoring {len(corpus):,} documents", flush=True)
  scores = filters.score(
    corpus, curated, ads, settings, lambda chunks: tqdm(chunks, unit="chunk", mininterval=2)
  )
  keys = [corpus.key(i) for i in range(len(corpus))]
  kept, stages = filters.decide(scores, keys, settings)
  _write(out, lambda file: filters.write(corpus, scores, kept, file, field))
  print(table(stages) + f"\n\n{out}", flush=True)
  return 0


def table(stages: Sequence) -> str:
  """Returns a table of `filters.Stage`s as text."""
  lines = [f"{'stage':<12}{'documents':>22}{'bytes':>30}{'kept':>8}{'ROC area':>10}"]
  for stage in stages:
    documents, size = (f"{b:,} -> {a:,}" for b, a in zip(stage.read, stage.kept, strict=True))
    area = "" if math.isnan(stage.roc_area) else f"{stage.roc_area:.3f}"
    share = stage.kept[0] / max(1, stage.read[0])
    lines.append(f"{stage.name:<12}{documents:>22}{size:>30}{share:>8.1%}{area:>10}")
  return "\n".join(lines)


def _share(name: str, value: str) -> float:
  """Returns the value of a flag that is a share in [0, 1)."""
  share = number(name, value)
  if not 0 <= share < 1:
    raise ConfigError(name, value, "must be a share from 0 to below 1, such as 0.15")
  return share


def _documents(name: str, field: str):
  """Returns all documents of a source."""
  from moe_jax.data.options import DataOptions
  from moe_jax.data.sources import make_sources

  # A fraction of 1 puts all documents into the part that is held out.
  options = DataOptions(sources=(name,), text_field=field, validation_fraction=1.0)
  (source,) = make_sources(options)
  return source.documents("validation")


def _write(out: pathlib.Path, fill) -> None:
  """Writes a file that appears whole or not at all."""
  unfinished = out.with_name(f"{out.name}.{secrets.token_hex(4)}.tmp")
  try:
    with open(unfinished, "xb") as file:
      fill(file)
    os.replace(unfinished, out)
  finally:
    unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
