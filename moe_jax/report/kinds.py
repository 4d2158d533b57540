"""Shows which kinds of tokens go to which experts."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from moe_jax.report.colours import LOAD_LABELS, LOAD_SCALE, ink, load_pixels

KINDS = ("special", "white space", "lower-case", "capitalised", "number", "punctuation", "other")
MOST_EXPERTS = 64  # more columns than these could not be read
_SHUFFLES = 20


def kind(piece: str | None) -> str:
  """Returns the kind of a token, one of `KINDS`.

  Args:
    piece: The text of the token, or None for a special token. White space around other text does
      not count, because subword tokens begin with it.
  """
  if piece is None:
    return "special"
  text = piece.strip()
  if not text:
    return "white space" if piece else "other"
  if not text.isascii() and not text.isalpha():
    return "other"
  if text.isalpha():
    return "lower-case" if text[0].islower() else "capitalised"
  if text.isdecimal():
    return "number"
  return "other" if any(c.isalnum() for c in text) else "punctuation"


def counts(
  kinds: Sequence[str], chosen: Int[np.ndarray, "N"], experts: int
) -> Int[np.ndarray, "K E"]:
  """Returns how many tokens of each kind have each first-choice expert.

  Args:
    kinds: The kind of each of N tokens.
    chosen: The expert of each token; `experts` stands for none.
    experts: The number of experts E.
  """
  index = np.array([KINDS.index(name) for name in kinds], int)
  table = np.zeros((len(KINDS), experts + 1), int)
  np.add.at(table, (index, np.minimum(chosen, experts)), 1)
  return table[:, :experts]


def explained(table: Int[np.ndarray, "K E"]) -> float:
  """Returns the share of the kind's entropy that the expert explains, in [0, 1].

  This is the mutual information of kind and expert, divided by the entropy of the kind. It is 0 if
  there is only one kind.

  Args:
    table: The number of tokens of each kind and expert.
  """
  joint = table / max(1, table.sum())

  def entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())

  of_kind = entropy(joint.sum(axis=1))
  information = of_kind + entropy(joint.sum(axis=0)) - entropy(joint.ravel())
  return max(0.0, information / of_kind) if of_kind > 0 else 0.0


def chance(kinds: Sequence[str], chosen: Int[np.ndarray, "N"], experts: int) -> float:
  """Returns the mean of `explained` if the experts are shuffled among the tokens.

  It is above 0, because a small sample always shows some relation. The shuffles have a fixed seed.
  """
  draw = np.random.default_rng(0)
  shuffled = [explained(counts(kinds, draw.permutation(chosen), experts)) for _ in range(_SHUFFLES)]
  return float(np.mean(shuffled))


def kinds_section(
  pieces: Sequence[str | None], chosen: Int[np.ndarray, "Lm N"], experts: int, layers: Sequence[str]
) -> str:
  """Returns a section with a table of kinds and experts for each layer, as HTML.

  It is "" if there are more experts than `MOST_EXPERTS`.

  Args:
    pieces: The text of each of N tokens, or None for a special token.
    chosen: The first-choice expert of each token in each of the Lm layers with experts.
    experts: The number of experts E.
    layers: The names of the layers.
  """
  if experts > MOST_EXPERTS:
    return ""
  kinds = [kind(piece) for piece in pieces]
  figures = "".join(
    f"<figure><figcaption>{html.escape(name)}</figcaption>"
    f"{_table(kinds, chosen[i], experts)}</figure>"
    for i, name in enumerate(layers)
  )
  scale = (
    f'<div class="scale"><i style="background:linear-gradient(90deg, {LOAD_SCALE})"></i><div>'
    + "".join(f"<span>{label}</span>" for label in LOAD_LABELS)
    + "</div></div>"
  )
  return (
    '<h2>Kinds of tokens by expert</h2><p class="lead">Where the tokens of each kind go, of the '
    "held-out text above: the percentage of the kind that has this first-choice expert. The colour "
    "compares it with the expert's share of all tokens: white is equal, brown is more.</p>"
    f'<div class="figures two">{figures}</div>{scale}'
  )


def _table(kinds: Sequence[str], chosen: Int[np.ndarray, "N"], experts: int) -> str:
  """Returns the table of a layer, with a sentence on how much the expert tells about the kind."""
  table = counts(kinds, chosen, experts)
  sizes = table.sum(axis=1)
  share = table / np.maximum(1, sizes)[:, None]
  head = "".join(f"<th>{expert}</th>" for expert in range(experts))
  colours = load_pixels(_relative(table))
  rows = ""
  for name, size, shares, row in zip(KINDS, sizes, share, colours, strict=True):
    if size:
      cells = "".join(_cell(value, colour) for value, colour in zip(shares, row, strict=True))
      rows += f"<tr><td>{name} ({size})</td>{cells}</tr>"
  return (
    f'<p class="note">The expert tells {explained(table):.1%} of what there is to know about the '
    f"kind; with shuffled experts it would be {chance(kinds, chosen, experts):.1%}.</p>"
    f'<div class="wide"><table class="kinds"><tr><th>kind (tokens)</th>{head}</tr>{rows}</table>'
    "</div>"
  )


def _relative(table: Int[np.ndarray, "K E"]) -> Float[np.ndarray, "K E"]:
  """Returns each count divided by what it would be if kind and expert were independent."""
  expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / max(1, table.sum())
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(expected > 0, table / expected, np.nan)


def _cell(share: float, colour: np.ndarray) -> str:
  """Returns a cell of the table: a percentage on its colour."""
  background = "#" + "".join(f"{int(channel):02x}" for channel in colour)
  return (
    f'<td class="cell" style="background:{background};color:{ink(background)}">{share:.0%}</td>'
  ).replace("%</td>", "</td>")
