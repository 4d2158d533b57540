"""Weighted mixtures of endless datasets, each of which is shuffled again in every epoch."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence

from moe_jax.data.rows import Rows
from moe_jax.data.sources import Source
from moe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Stretch:
  """A stretch of the training data in which the shares of the sources do not change.

  Attributes:
    shares: The share of each source.
    start: The number of batches before the stretch.
    read: The number of records of each source in the batches before the stretch.
  """

  shares: tuple[float, ...]
  start: int
  read: tuple[int, ...]


def weights(
  configured: Sequence[float | int], sources: Sequence[Source], sizes: Sequence[int]
) -> list[float]:
  """Returns the share of each source in the mixture; the shares sum to 1.

  A source with share 0 is only used for evaluation.

  Args:
    configured: `data.weights`. If it is empty, the shares are proportional to `sizes`.
    sources: The sources of the mixture.
    sizes: The number of records of each source.

  Raises:
    ConfigError: If the number of weights is not that of the sources, if a weight is negative or not
      finite, or if no weight is above 0.
  """
  shares = [float(w) for w in (configured or sizes)]
  if len(shares) != len(sources):
    names = ", ".join(source.name for source in sources)
    raise ConfigError(
      "data.weights",
      tuple(configured),
      f"needs one weight for each of the {len(sources)} "
      f"data.sources ({names}), or () for their natural shares",
    )
  if not all(0 <= w < float("inf") for w in shares) or not any(shares):
    raise ConfigError(
      "data.weights", tuple(configured), "must be finite, none below 0 and at least one above 0"
    )
  return [w / sum(shares) for w in shares]


def mix(
  records: Sequence,
  shares: Sequence[float | int],
  sources: Sequence[Source],
  seed: int,
  read: Sequence[int] = (),
):
  """Returns an endless Grain MapDataset that interleaves all `records` evenly.

  Every prefix of it contains each source's share to within about one record. The order of a
  source's records depends only on the seed and `Source.order`, and not on the other sources.

  Args:
    records: A random-access sequence of records for each source.
    shares: The share of each source.
    sources: The sources.
    seed: The seed of all shuffling.
    read: The number of records of each source that were read before, which are left out. () means
      none.
  """
  # Imported here because it takes a second and only iterators need it.
  import grain

  used = [
    (r, s, n)
    for r, w, s, n in zip(records, shares, sources, read or [0] * len(sources), strict=True)
    if w > 0
  ]
  datasets = [
    grain.MapDataset.source(r).seed(_seed(seed, s.order)).shuffle().repeat()[n:] for r, s, n in used
  ]
  return grain.MapDataset.mix(datasets, [p for p in _proportions(shares) if p])


def drawn(shares: Sequence[float | int], count: int) -> list[int]:
  """Returns how many of the first `count` records of `mix` come from each source."""
  proportions = _proportions(shares)
  numbers, others = [], sum(proportions)
  # Grain decides for one source after the other which of the places that are left it takes. Of the
  # first `count` of them, those of all later sources are their exact number, rounded down.
  for proportion in proportions:
    left = count * (others - proportion) // others if others else 0
    numbers.append(count - left)
    count, others = left, others - proportion
  return numbers


def next_stretch(
  stretch: Stretch, shares: Sequence[float], batches: int, batch_size: int
) -> Stretch:
  """Returns the stretch with other shares that begins after `batches` batches.

  Args:
    stretch: The stretch before, in which these batches end.
    shares: The share of each source in the new one.
    batches: The number of all batches until then.
    batch_size: Number of rows of the global batch.
  """
  new = drawn(stretch.shares, (batches - stretch.start) * batch_size)
  read = (before + count for before, count in zip(stretch.read, new, strict=True))
  return Stretch(tuple(shares), batches, tuple(read))


def _proportions(shares: Sequence[float | int]) -> list[int]:
  """Returns whole numbers in the proportions of the shares, of which the least above 0 is 100.

  Grain multiplies its weights by 100 / least and truncates them, which does not change these.
  """
  least = min(w for w in shares if w > 0)
  return [round(100 * w / least) for w in shares]


def local_rows(dataset, rows: Rows, start: int):
  """Returns the rows of this process of all batches from batch number `start` on, in order."""
  import grain

  class Selection(grain.transforms.DatasetSelectionMap):
    """Maps the i-th row of this process to the index of the only dataset and the row in it."""

    def __len__(self) -> int:
      return sys.maxsize

    def __getitem__(self, i: int) -> tuple[int, int]:
      return 0, start * rows.batch_size + rows.index(i)

  return grain.MapDataset.select_from_datasets([dataset], Selection())


def _seed(seed: int, order: str) -> int:
  """Returns a seed of 32 bits for the source with this `Source.order`."""
  return int.from_bytes(hashlib.blake2b(f"{seed}:{order}".encode(), digest_size=4).digest(), "big")
