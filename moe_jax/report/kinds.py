"""Shows which kinds of tokens go to which experts."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from moe_jax.analysis.information import explained, explained_by_chance, table
from moe_jax.analysis.kinds import KINDS, kinds_of
from moe_jax.report.tables import MOST_EXPERTS, expert_table, scale


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
  kinds = kinds_of(pieces)
  figures = "".join(
    f"<figure><figcaption>{html.escape(name)}</figcaption>"
    f"{_table(kinds, chosen[i], experts)}</figure>"
    for i, name in enumerate(layers)
  )
  return (
    '<h2>Kinds of tokens by expert</h2><p class="lead">Where the tokens of each kind go, of the '
    "held-out text above: the percentage of the kind that has this first-choice expert. The colour "
    "compares it with the expert's share of all tokens: white is equal, brown is more.</p>"
    f'<div class="figures two">{figures}</div>{scale()}'
  )


def _table(kinds: Int[np.ndarray, "N"], chosen: Int[np.ndarray, "N"], experts: int) -> str:
  """Returns the table of a layer, with a sentence on what the expert tells about the kind."""
  shape = (len(KINDS), experts)
  counts = table(kinds, chosen, shape)
  return (
    '<p class="note">Knowing which expert a token went to reduces the uncertainty (entropy) about '
    f"the token's kind by {explained(counts):.1%}; with shuffled experts it is "
    f"{explained_by_chance(kinds, chosen, shape):.1%}.</p>"
    + expert_table("kind (tokens)", KINDS, counts)
  )
