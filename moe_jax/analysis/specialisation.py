"""How much of a token's expert its kind, its identity and its domain explain.

The explained share of the expert is I(expert; x) / H(expert) for its first choice. What the
identity of a token explains within a domain, I(expert; token | domain), is lexical; what the domain
explains among tokens of one identity, I(expert; domain | token), is topical. Mixtral's paper
(arXiv 2401.04088, Sec. 5) finds specialisation of the former sort, by eye.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moe_jax.analysis.information import SHUFFLES, Entropies, relative, shuffled_within, table
from moe_jax.analysis.kinds import KINDS
from moe_jax.analysis.recorded import Recorded

# Ids with fewer tokens than these an expert are one identity with the other rare ids of their kind.
RARE = 10
# Measure -> (what explains the expert, what is given).
MEASURES: Mapping[str, tuple[str, tuple[str, ...]]] = {
  "kind": ("kind", ()),
  "token": ("token", ()),
  "domain": ("domain", ()),
  "lexical": ("token", ("domain",)),
  "topical": ("domain", ("token",)),
}


class Explained(NamedTuple):
  """The explained shares of the expert in a layer, in the order of `MEASURES`.

  Attributes:
    expert_entropy: H(expert) in nats, what there is to explain.
    value: The explained shares, in [0, 1].
    most: The largest values that they could have, in [0, 1]. A label with few values cannot explain
      everything.
    chance: Their means over shuffles.
    chance_width: Half of the width of the interval that has 95 % of the shuffles.
  """

  expert_entropy: float
  value: Float[np.ndarray, "M"]
  most: Float[np.ndarray, "M"]
  chance: Float[np.ndarray, "M"]
  chance_width: Float[np.ndarray, "M"]


def identities(recorded: Recorded) -> tuple[Int[np.ndarray, "N"], list[str]]:
  """Returns the identity of each token, and the text of each identity.

  The identity is the token's id or, for a rare id, one label for all rare ids of its kind. Ids
  whose tokens have no text, or several (bytes of characters), are named by their number.
  """
  ids, index, counts = np.unique(recorded.ids, return_inverse=True, return_counts=True)
  is_rare = counts[index] < RARE * recorded.num_experts
  labels = np.where(is_rare, recorded.kind, len(KINDS) + index)
  used, identity = np.unique(labels, return_inverse=True)
  pieces: dict[int, set[str | None]] = {}
  for label, piece in zip(labels.tolist(), recorded.pieces, strict=True):
    pieces.setdefault(label, set()).add(piece)

  def text(label):
    if label < len(KINDS):
      return f"rare: {KINDS[label]}"
    only = next(iter(pieces[label])) if len(pieces[label]) == 1 else None
    return only or f"id {ids[label - len(KINDS)]}"

  return identity, [text(label) for label in used.tolist()]


def labels_of(recorded: Recorded) -> tuple[dict[str, Int[np.ndarray, "N"]], list[str]]:
  """Returns the labels that explain experts, by name, and the text of each identity."""
  identity, texts = identities(recorded)
  return {"kind": recorded.kind, "token": identity, "domain": recorded.domain}, texts


def explained(
  expert: Int[np.ndarray, "N"],
  labels: Mapping[str, Int[np.ndarray, "N"]],
  names: Sequence[str] = tuple(MEASURES),
) -> Float[np.ndarray, "M"]:
  """Returns the shares of the expert that the labels explain, one for each of the M measures.

  A share is 0 if there is nothing to explain, because all tokens have the same expert.

  Args:
    expert: The expert of each token.
    labels: The labels of each token; see `labels_of`.
    names: The names of the measures, keys of `MEASURES`.
  """
  entropies = Entropies({"expert": expert, **labels})
  whole = entropies.joint("expert")
  shares = [
    entropies.information("expert", of, *given) for of, given in (MEASURES[name] for name in names)
  ]
  return np.array(shares) / whole if whole > 0 else np.zeros(len(names))


def with_chance(
  expert: Int[np.ndarray, "N"],
  labels: Mapping[str, Int[np.ndarray, "N"]],
  row: Int[np.ndarray, "N"],
) -> Explained:
  """Returns the explained shares of a layer beside their levels of chance.

  A level of chance is the mean over shuffles, whose seed is fixed. For what kind or identity
  explain by chance, experts are shuffled among all tokens or, if the domain is given, among those
  of their domain. For what the domain explains by chance, whole rows are dealt to the domains,
  because the tokens of a text are alike in more than their domain.

  Args:
    expert: The expert of each token.
    labels: The labels of each token; see `labels_of`.
    row: The row of each token.
  """
  draw = np.random.default_rng(0)
  shuffles = []
  for _ in range(SHUFFLES):
    inside = expert[shuffled_within(labels["domain"], draw)]
    dealt = {**labels, "domain": deal_rows(row, labels["domain"], draw)}
    kind, token = explained(draw.permutation(expert), labels, ("kind", "token"))
    (lexical,) = explained(inside, labels, ("lexical",))
    domain, topical = explained(expert, dealt, ("domain", "topical"))
    shuffles.append((kind, token, domain, lexical, topical))
  entropies = Entropies({"expert": expert, **labels})
  whole = entropies.joint("expert")
  most = np.array([entropies.most("expert", of, *given) for of, given in MEASURES.values()])
  return Explained(
    whole,
    explained(expert, labels),
    most / whole if whole > 0 else np.zeros(len(most)),
    np.mean(shuffles, axis=0),
    1.96 * np.std(shuffles, axis=0, ddof=1),
  )


def deal_rows(
  row: Int[np.ndarray, "N"], domain: Int[np.ndarray, "N"], draw: np.random.Generator
) -> Int[np.ndarray, "N"]:
  """Returns a domain for each token after whole rows were dealt to the domains at random.

  Each domain gets as many rows as it has.
  """
  rows, first = np.unique(row, return_index=True)
  dealt = np.zeros(int(rows.max(initial=-1)) + 1, int)
  dealt[rows] = draw.permutation(domain[first])
  return dealt[row]


def typical(
  expert: Int[np.ndarray, "N"], identity: Int[np.ndarray, "N"], num_experts: int, count: int
) -> list[list[int]]:
  """Returns the identities that say most about each expert, at most `count` for each, best first.

  An identity t is ranked by its part p(t, e) ln(p(t, e) / (p(t) p(e))) of the mutual information.
  Only identities that have the expert more often than other tokens are listed.
  """
  counts = table(identity, expert, (int(identity.max(initial=-1)) + 1, num_experts))
  ratio = np.nan_to_num(relative(counts))
  with np.errstate(divide="ignore", invalid="ignore"):
    part = np.where(ratio > 1, counts * np.log(ratio), 0.0)
  order = np.argsort(-part, axis=0, kind="stable")[:count]
  return [[int(t) for t in order[:, e] if part[t, e] > 0] for e in range(num_experts)]
