"""What a model's routers did with the tokens of several domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Recorded(NamedTuple):
  """N tokens and how the Lm layers with experts of a stack routed them.

  Attributes:
    layers: The name of each of the Lm layers.
    domains: The names of the D domains.
    num_experts: The number of experts E.
    ids: The token's id.
    pieces: The token's text, or None for a special token; "" is a part of a character.
    kind: The token's kind, an index in `kinds.KINDS`.
    domain: The token's domain, in [0, D).
    row: The row of text that the token is in. Rows are numbered in the order of the tokens, and
      each lies in one domain.
    follows: Whether the token is the successor of the token before it, in the same document.
    first: The token's first choice in each layer, before capacity; E stands for no expert.
    second: The token's second choice; E stands for none.
    entropy: The entropy of the router's probabilities, in nats, in [0, ln E].
    top: The largest of the router's probabilities.
  """

  layers: Sequence[str]
  domains: Sequence[str]
  num_experts: int
  ids: Int[np.ndarray, "N"]
  pieces: Sequence[str | None]
  kind: Int[np.ndarray, "N"]
  domain: Int[np.ndarray, "N"]
  row: Int[np.ndarray, "N"]
  follows: Bool[np.ndarray, "N"]
  first: Int[np.ndarray, "Lm N"]
  second: Int[np.ndarray, "Lm N"]
  entropy: Float[np.ndarray, "Lm N"]
  top: Float[np.ndarray, "Lm N"]


def blocks(recorded: Recorded, count: int) -> Int[np.ndarray, "N"]:
  """Returns the block of each token, in [0, count), for the delete-one-block jackknife.

  Each block has successive rows of every domain, so that most documents lie in one block.
  """
  block_of_row = np.zeros(int(recorded.row.max(initial=-1)) + 1, int)
  for domain in range(len(recorded.domains)):
    rows = np.unique(recorded.row[recorded.domain == domain])
    block_of_row[rows] = np.arange(len(rows)) * count // max(1, len(rows))
  return block_of_row[recorded.row]


def rows_per_domain(recorded: Recorded) -> list[int]:
  """Returns the number of rows of each domain."""
  return [len(np.unique(recorded.row[recorded.domain == d])) for d in range(len(recorded.domains))]
