"""Shows which experts of a layer are chosen together."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from moe_jax.analysis.information import relative_pairs, table
from moe_jax.report.tables import MOST_EXPERTS, expert_table, scale


def pairs_section(
  first: Int[np.ndarray, "Lm N"],
  second: Int[np.ndarray, "Lm N"],
  experts: int,
  layers: Sequence[str],
) -> str:
  """Returns a section with a map of pairs of experts for each layer, as HTML.

  It is "" if there are fewer than three experts, because two are always the same pair, or more
  than `MOST_EXPERTS`, or if no token has two choices. Layers without such tokens are left out.

  Args:
    first: The first-choice expert of each of N tokens in each of the Lm layers with experts; E
      stands for none.
    second: The second choice, which differs from the first one.
    experts: The number of experts E.
    layers: The names of the layers.
  """
  if not 3 <= experts <= MOST_EXPERTS:
    return ""
  names, figures = [str(expert) for expert in range(experts)], ""
  for i, name in enumerate(layers):
    ordered = table(first[i], second[i], (experts, experts))
    pairs = ordered + ordered.T
    if pairs.any():
      figures += (
        f"<figure><figcaption>{html.escape(name)}</figcaption>"
        f"{expert_table('expert (tokens)', names, pairs, relative_pairs(pairs))}</figure>"
      )
  if not figures:
    return ""
  return (
    '<h2>Experts that are chosen together</h2><p class="lead">Of the tokens above that have an '
    "expert as one of their first two choices, the percentage whose other choice is each expert. "
    "The colour compares it with chance, which pairs each expert as often but at random: white is "
    "equal, brown is more, blue is less, grey is the expert itself.</p>"
    f'<div class="figures two">{figures}</div>{scale()}'
  )
