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
  if "drop_advertising" in flags and "advertising" not in flags:
    raise ConfigError(
      "drop_advertising",
      flags["drop_advertising"],
      "needs examples; give --advertising=SOURCE, too",
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
  from moe_jax.training import progress, workdir

  field = flags.get("text_field", "text")
  corpus = _documents("source", flags["source"], field)
  curated = _documents("curated", flags["curated"], field) if alpha or fluency else None
  ads = None
  if "advertising" in flags:
    ads = _documents("advertising", flags["advertising"], field)
  settings = filters.Settings(advertising if ads is not None else 0.0, fluency, alpha or None, seed)
  print(f"fitting to examples, then scoring {len(corpus):,} documents", flush=True)
  with progress.working("fitting and scoring", tqdm.write):
    scores = filters.score(
      corpus, curated, ads, settings, lambda chunks: tqdm(chunks, unit="chunk", mininterval=2)
    )
  keys = [corpus.key(i) for i in range(len(corpus))]
  kept, stages = filters.decide(scores, keys, settings)
  with workdir.atomic_file(out) as file:
    filters.write(corpus, scores, kept, file, field)
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


def _documents(flag: str, name: str, field: str):
  """Returns all documents of the source that a flag names.

  Raises:
    ConfigError: There is no such text. The message names flags of this command, not config keys.
  """
  from moe_jax.data.options import DataOptions
  from moe_jax.data.sources import make_sources

  # A fraction of 1 puts all documents into the part that is held out.
  options = DataOptions(sources=(name,), text_field=field, validation_fraction=1.0)
  try:
    (source,) = make_sources(options)
  except ConfigError as error:
    names = {"data.sources": flag, "data.text_field": "text_field"}
    remedy = error.remedy.replace("--config.data.text_field", "--text_field")
    raise ConfigError(names.get(error.field, error.field), error.value, remedy) from error
  return source.documents("validation")


if __name__ == "__main__":
  sys.exit(main(sys.argv))
