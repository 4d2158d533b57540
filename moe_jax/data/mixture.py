"""Weighted mixtures of endless datasets, each of which is shuffled again in every epoch."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence

from moe_jax.data.rows import Rows
from moe_jax.data.sources import Source
from moe_jax.errors import ConfigError


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


def mix(records: Sequence, shares: Sequence[float | int], sources: Sequence[Source], seed: int):
  """Returns an endless Grain MapDataset that interleaves all `records` evenly.

  Every prefix of it contains each source's share to within about one record. The order of a
  source's records depends only on the seed and `Source.order`, and not on the other sources.

  Args:
    records: A random-access sequence of records for each source.
    shares: The share of each source.
    sources: The sources.
    seed: The seed of all shuffling.
  """
  # Imported here because it takes a second and only iterators need it.
  import grain

  used = [(r, w, s) for r, w, s in zip(records, shares, sources, strict=True) if w > 0]
  datasets = [
    grain.MapDataset.source(r).seed(_seed(seed, s.order)).shuffle().repeat() for r, _, s in used
  ]
  least = min(w for _, w, _ in used)
  # Grain multiplies the weights by 100 / least and truncates them. Integers whose least is 100 are
  # not changed by that.
  return grain.MapDataset.mix(datasets, [round(100 * w / least) for _, w, _ in used])


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
