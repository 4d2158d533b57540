"""All statistics of a recorded stack of layers, as values that JSON can hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Int

from moe_jax.analysis import findings, jackknife, sequences, specialisation
from moe_jax.analysis.information import entropy, table
from moe_jax.analysis.kinds import KINDS
from moe_jax.analysis.recorded import Recorded, rows_per_domain

TYPICAL = 12  # identities listed for each expert


def analyse(recorded: Recorded, before: Int[np.ndarray, "Lm N"] | None = None) -> dict[str, Any]:
  """Returns the statistics of a stack of layers.

  Args:
    recorded: The tokens and their routing.
    before: The first choices of the same tokens at another checkpoint, for `churn`.

  Returns:
    A dict with the entries below. Lists over layers have Lm entries, in the order of "layers".
      layers, domains, kinds: The names of layers, domains and kinds.
      tokens, rows: The number of tokens and of rows of each domain.
      tokens_by_kind: The number of tokens of each kind.
      by_domain [Lm][D][E], by_kind [Lm][K][E]: The number of tokens with each first choice.
      entropy_by_kind [Lm][K]: The entropy of the experts of a kind, in nats, as ST-MoE (arXiv
        2202.08906) reports it for sentinels; None for kinds without tokens.
      typical [Lm][E]: Texts of the tokens that say most about each expert.
      explained: For each layer, "expert_entropy" in nats and, for each of
        `specialisation.MEASURES`, the share of it that is explained: "value", "half_width" of its
        95 % interval, "most", "chance" and "chance_half_width".
      sharpness: For each layer "entropy" (nats), "top" (the mean of the largest probability) and
        the half widths of their 95 % intervals.
      repetition [Lm]: `sequences.Repetition` for each domain; "uniform_repetition" has the values
        of uniform choices.
      coactivation [Lm - 1]: `sequences.Coactivation` of each layer with the next.
      churn [Lm]: `sequences.Churn` for each domain, or None without `before`.
      findings: `findings.lexical` and `findings.sharper`.
  """
  labels, texts = specialisation.labels_of(recorded)
  masks = jackknife.without_each_block(recorded)
  shares, explained = _explained(recorded, labels, masks)
  sharp = _sharpness(recorded, masks)
  return {
    "layers": list(recorded.layers),
    "domains": list(recorded.domains),
    "kinds": list(KINDS),
    "num_experts": recorded.num_experts,
    "tokens": np.bincount(recorded.domain, minlength=len(recorded.domains)).tolist(),
    "rows": rows_per_domain(recorded),
    "tokens_by_kind": np.bincount(recorded.kind, minlength=len(KINDS)).tolist(),
    **_tables(recorded),
    "typical": [
      [
        [texts[t] for t in identities]
        for identities in specialisation.typical(
          first, labels["token"], recorded.num_experts, TYPICAL
        )
      ]
      for first in recorded.first
    ],
    "explained": explained,
    "sharpness": sharp,
    "repetition": _repetition(recorded),
    "uniform_repetition": list(sequences.uniform_repetition(recorded.num_experts)),
    "coactivation": _coactivation(recorded),
    "churn": None if before is None else _churn(recorded, before),
    "findings": {
      "lexical": findings.lexical(shares, len(recorded.domains)),
      "sharper": findings.sharper(sharp["entropy"], sharp["top"]),
    },
  }


def _explained(recorded: Recorded, labels, masks) -> tuple[findings.Shares, list[dict[str, Any]]]:
  """Returns the explained shares of all layers, as arrays and as JSON holds them."""
  layers = [specialisation.with_chance(expert, labels, recorded.row) for expert in recorded.first]

  def of_part(mask):
    kept = {name: label[mask] for name, label in labels.items()}
    return np.stack([specialisation.explained(expert[mask], kept) for expert in recorded.first])

  replicates = jackknife.replicates(masks, of_part, (len(layers), len(specialisation.MEASURES)))
  widths = jackknife.half_width(replicates)
  as_json = [
    {
      "expert_entropy": layer.expert_entropy,
      **{
        name: _finite(
          {
            "value": float(layer.value[m]),
            "most": float(layer.most[m]),
            "half_width": float(width[m]),
            "chance": float(layer.chance[m]),
            "chance_half_width": float(layer.chance_width[m]),
          }
        )
        for m, name in enumerate(specialisation.MEASURES)
      },
    }
    for layer, width in zip(layers, widths, strict=True)
  ]
  shares = findings.Shares(
    value=np.stack([layer.value for layer in layers]),
    most=np.stack([layer.most for layer in layers]),
    chance=np.stack([layer.chance for layer in layers]),
    chance_width=np.stack([layer.chance_width for layer in layers]),
    replicates=replicates,
  )
  return shares, as_json


def _sharpness(recorded: Recorded, masks) -> dict[str, list[Any]]:
  """Returns the sharpness of all layers with the half widths of its intervals."""
  measured: dict[str, list[Any]] = {}
  for name, values in (("entropy", recorded.entropy), ("top", recorded.top)):

    def mean(mask, values=values):
      return values[:, mask].mean(axis=1)

    replicates = jackknife.replicates(masks, mean, (len(values),))
    measured[name] = values.mean(axis=1).tolist()
    widths = jackknife.half_width(replicates)
    measured[f"{name}_half_width"] = [float(w) if np.isfinite(w) else None for w in widths]
  return measured


def _tables(recorded: Recorded) -> dict[str, Any]:
  """Returns the tables of domains and of kinds by expert."""
  experts, num_kinds = recorded.num_experts, len(KINDS)
  by_kind = [table(recorded.kind, first, (num_kinds, experts)) for first in recorded.first]
  return {
    "by_domain": [
      table(recorded.domain, first, (len(recorded.domains), experts)).tolist()
      for first in recorded.first
    ],
    "by_kind": [counts.tolist() for counts in by_kind],
    "entropy_by_kind": [
      [entropy(row) if row.sum() else None for row in counts] for counts in by_kind
    ],
  }


def _by_domain(recorded: Recorded, statistic) -> list[list[dict[str, Any]]]:
  """Returns `statistic(layer, mask)._asdict()` of each layer and of the tokens of each domain."""
  masks = [recorded.domain == d for d in range(len(recorded.domains))]
  return [
    [_finite(statistic(layer, mask)._asdict()) for mask in masks]
    for layer in range(len(recorded.layers))
  ]


def _repetition(recorded: Recorded) -> list[list[dict[str, Any]]]:
  """Returns the repetition of experts in each layer and domain."""

  def of_part(layer, mask):
    first, second = recorded.first[layer][mask], recorded.second[layer][mask]
    return sequences.repetition(first, second, recorded.follows[mask], recorded.num_experts)

  return _by_domain(recorded, of_part)


def _churn(recorded: Recorded, before: Int[np.ndarray, "Lm N"]) -> list[list[dict[str, Any]]]:
  """Returns the churn of each layer and domain."""

  def of_part(layer, mask):
    after = recorded.first[layer][mask]
    return sequences.churn(before[layer][mask], after, recorded.num_experts)

  return _by_domain(recorded, of_part)


def _coactivation(recorded: Recorded) -> list[dict[str, Any]]:
  """Returns how the experts of each layer and of the next one go together."""
  pairs = zip(recorded.first[:-1], recorded.first[1:], strict=True)
  found = [sequences.coactivation(*pair, recorded.num_experts)._asdict() for pair in pairs]
  return [each | {"counts": each["counts"].tolist()} for each in found]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
  """Returns a dict in which None stands for numbers that are not finite, which JSON lacks."""
  return {
    name: None if isinstance(value, float) and not math.isfinite(value) else value
    for name, value in values.items()
  }
