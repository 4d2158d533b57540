"""Weighted mixtures of endless datasets, each shuffled anew in every epoch."""

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
  """Shares that sum to 1: `data.weights`, or in proportion to `sizes` where that is empty.

  A source may have share 0: it is only evaluated.

  Raises:
    ConfigError: not one weight a source, a negative one, or none above 0.
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
  """An endless Grain MapDataset of all `records` (random-access sequences), interleaved evenly in
  these shares.

  Every prefix holds each source's share to within about one record. The order in which a source
  comes depends on the seed and its name, not on its neighbours.
  """
  import grain  # takes a second; only iterators need it

  used = [(r, w, s) for r, w, s in zip(records, shares, sources, strict=True) if w > 0]
  datasets = [
    grain.MapDataset.source(r).seed(_seed(seed, s.name)).shuffle().repeat() for r, _, s in used
  ]
  least = min(w for _, w, _ in used)
  # Grain multiplies by 100 / least and truncates: whole numbers of which the least is 100 stay what
  # they are.
  return grain.MapDataset.mix(datasets, [round(100 * w / least) for _, w, _ in used])


def local_rows(dataset, rows: Rows, start: int):
  """This process's rows of all batches from batch number `start` on, in order."""
  import grain

  class Selection(grain.transforms.DatasetSelectionMap):
    """i-th row of this process -> (the one dataset, its row)."""

    def __len__(self) -> int:
      return sys.maxsize

    def __getitem__(self, i: int) -> tuple[int, int]:
      return 0, start * rows.batch_size + rows.index(i)

  return grain.MapDataset.select_from_datasets([dataset], Selection())


def _seed(seed: int, name: str) -> int:
  return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest(), "big")
