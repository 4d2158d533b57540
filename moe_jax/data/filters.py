"""Filters a corpus in stages, each of which reports how much it keeps.

advertising  drops the share of the documents that are most like examples of advertising
fluency      drops the share whose bytes are least probable under n-grams of curated text
quality      keeps documents by GLaM's classifier and Pareto sampling (`quality.py`)

LLaMA-MoE v2 drops about 15 % of web pages as least fluent, which helps, and tried to drop 50 % as
advertising, which lowers the loss and hurts its tasks. The models behind its scores are not ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from moe_jax.data.documents import Documents, uniform
from moe_jax.data.ladder import WittenBell
from moe_jax.data.quality import ALPHA, Classifier, pareto_keeps, roc_area

# Documents are scored so many at a time.
_CHUNK = 256
# The most documents of a kind, and bytes of n-grams, that a model is fitted to.
_MOST_DOCUMENTS = 20_000
_MOST_BYTES = 2**24
_ORDER = 5  # n of the n-grams
# The share of the documents that no classifier is fitted to, on which its ROC area is measured.
_HELD_OUT = 0.2


class Settings(NamedTuple):
  """What the stages do.

  Attributes:
    advertising: The share of the documents to drop as advertising, in [0, 1); 0 leaves the stage
      out.
    fluency: The share of the documents to drop as least fluent, in [0, 1); 0 leaves the stage out.
    alpha: The exponent of the Pareto sampling, > 0; None leaves the stage out.
    seed: The seed of the sampling.
  """

  advertising: float = 0.0
  fluency: float = 0.0
  alpha: float | None = ALPHA
  seed: int = 0


class Stage(NamedTuple):
  """What a stage has kept.

  Attributes:
    name: The name of the stage.
    read: The documents, and the bytes, that came in.
    kept: The documents, and the bytes, that are left.
    roc_area: The area under the ROC curve of the stage's classifier on documents that it was not
      fitted to; NaN without a classifier.
  """

  name: str
  read: tuple[int, int]
  kept: tuple[int, int]
  roc_area: float


class Scores(NamedTuple):
  """The scores of D documents; None for those of a stage that is left out.

  Attributes:
    lengths: The bytes of each document.
    advertising: The probability that a document is advertising.
    bits: The bits per byte under n-grams of curated text; inf for an empty document.
    quality: The probability that a document is curated.
    areas: Name of a stage with a classifier -> its ROC area.
  """

  lengths: np.ndarray
  advertising: Float[np.ndarray, "D"] | None
  bits: Float[np.ndarray, "D"] | None
  quality: Float[np.ndarray, "D"] | None
  areas: dict[str, float]


def score(
  corpus: Documents,
  curated: Documents | None,
  advertising: Documents | None,
  settings: Settings,
  progress: Callable[[Sequence[int]], Iterable[int]] = lambda chunks: chunks,
) -> Scores:
  """Scores all documents of a corpus for the stages that `settings` names.

  Args:
    corpus: The documents to filter.
    curated: Examples of good text, which fluency and quality need.
    advertising: Examples of advertising, which that stage needs.
    settings: The settings.
    progress: Wraps the sequence of chunks, for a progress bar.
  """
  areas: dict[str, float] = {}
  ads = good = fluent = None
  if settings.advertising and advertising is not None:
    ads, areas["advertising"] = _classifier(advertising, corpus)
  if settings.alpha is not None and curated is not None:
    good, areas["quality"] = _classifier(curated, corpus)
  if settings.fluency and curated is not None:
    fluent = WittenBell(_up_to(_MOST_BYTES, curated), _ORDER)
  lengths, columns = [], {"advertising": [], "bits": [], "quality": []}
  for start in progress(range(0, len(corpus), _CHUNK)):
    chunk = [corpus[i] for i in range(start, min(start + _CHUNK, len(corpus)))]
    lengths += map(len, chunk)
    if ads is not None:
      columns["advertising"].append(ads.scores(chunk))
    if fluent is not None:
      columns["bits"].append(np.nan_to_num(fluent.bits_per_byte(chunk), nan=np.inf))
    if good is not None:
      columns["quality"].append(good.scores(chunk))
  joined = {name: np.concatenate(parts) if parts else None for name, parts in columns.items()}
  return Scores(np.array(lengths, np.int64), **joined, areas=areas)


def decide(
  scores: Scores, keys: Sequence[str], settings: Settings
) -> tuple[Bool[np.ndarray, "D"], list[Stage]]:
  """Returns which documents all stages keep, and what each stage kept, in order.

  The shares of advertising and fluency are of the documents that come into the stage. Among equal
  scores, earlier documents are kept.

  Args:
    scores: The scores of the documents.
    keys: The key of each document.
    settings: The settings.
  """
  kept, stages = np.ones(len(keys), bool), []

  def stage(name: str, good: Bool[np.ndarray, "D"]) -> None:
    nonlocal kept
    before, kept = kept, kept & good
    amounts = [(int(mask.sum()), int(scores.lengths[mask].sum())) for mask in (before, kept)]
    stages.append(Stage(name, *amounts, roc_area=scores.areas.get(name, float("nan"))))

  if scores.advertising is not None:
    stage("advertising", _without_worst(scores.advertising, kept, settings.advertising))
  if scores.bits is not None:
    stage("fluency", _without_worst(scores.bits, kept, settings.fluency))
  if scores.quality is not None and settings.alpha is not None:
    stage("quality", pareto_keeps(scores.quality, keys, settings.alpha, settings.seed))
  return kept, stages


def write(
  corpus: Documents, scores: Scores, kept: Bool[np.ndarray, "D"], file: BinaryIO, field: str
) -> None:
  """Writes the kept documents as lines of JSON, each with its text and its scores.

  Bytes that are not UTF-8 become U+FFFD.

  Args:
    corpus: The documents.
    scores: Their scores.
    kept: Which of them to write.
    file: An open file.
    field: The name of the field of the text.
  """
  parts = (("advertising", scores.advertising), ("bits", scores.bits), ("quality", scores.quality))
  for i in np.flatnonzero(kept):
    line = {field: corpus[int(i)].decode("utf-8", "replace")}
    line |= {name: round(float(part[i]), 6) for name, part in parts if part is not None}
    file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def _classifier(positive: Documents, negative: Documents) -> tuple[Classifier, float]:
  """Fits a classifier to most of two kinds of documents.

  Returns:
    The classifier, and its ROC area on the documents that were held out; NaN if a kind has none.
  """
  (fitted, held), (others, others_held) = map(_divided, (positive, negative))
  classifier = Classifier(fitted, others)
  area = float("nan")
  if held and others_held:
    area = roc_area(classifier.scores(held), classifier.scores(others_held))
  return classifier, area


def _divided(documents: Documents) -> tuple[list[bytes], list[bytes]]:
  """Returns the documents to fit to and those that are held out, by a hash of their keys."""
  drawn = np.array([uniform(f"filter {documents.key(i)}") for i in range(len(documents))])
  order = np.argsort(drawn, kind="stable")[:_MOST_DOCUMENTS]
  # At least one document is fitted to.
  cut = min(int(len(order) * _HELD_OUT), len(order) - 1)
  return [documents[int(i)] for i in order[cut:]], [documents[int(i)] for i in order[:cut]]


def _up_to(size: int, documents: Documents) -> list[bytes]:
  """Returns documents in the order of a hash of their keys, up to about `size` bytes."""
  drawn = [uniform(f"filter {documents.key(i)}") for i in range(len(documents))]
  return list(_first(size, (documents[int(i)] for i in np.argsort(drawn, kind="stable"))))


def _first(size: int, documents: Iterator[bytes]) -> Iterator[bytes]:
  """Yields documents until they have `size` bytes."""
  for document in documents:
    yield document
    size -= len(document)
    if size <= 0:
      return


def _without_worst(
  values: Float[np.ndarray, "D"], among: Bool[np.ndarray, "D"], share: float
) -> Bool[np.ndarray, "D"]:
  """Returns a mask without the `share` of the documents in `among` that have the largest values."""
  order = np.flatnonzero(among)
  order = order[np.argsort(values[order], kind="stable")]
  good = np.ones(len(values), bool)
  good[order[len(order) - int(share * len(order)) :]] = False
  return good
