"""Judges whether the paper's findings hold here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from experiments.common import findings
from experiments.common.findings import FAILS, HOLDS, OPEN, PARTLY
from experiments.st_moe_stability import paper
from experiments.st_moe_stability.outcome import Mean, Outcome

# The quality, in minus nats a target, of a table of bigrams of the targets, which a row must exceed
# before anything can be said about what changes it: a model that has learnt less knows no more than
# how frequent symbols are. `python -m experiments st_moe_stability ngrams` measures such tables:
# 2.83 nats a target for bigrams, 3.08 for the symbols of each position, 3.65 for all symbols.
LEARNT = -2.83


@dataclasses.dataclass(frozen=True)
class Finding:
  """A statement of the paper about one row in comparison with another.

  Attributes:
    words: The finding in words.
    table: The table or section of the paper.
    row: The row that the finding is about.
    against: The row that it is compared with.
    stabilises: Whether the finding says that all seeds of the row are stable, and not all of the
      other row.
    quality: "better", "worse" or "no worse", or "" if the finding says nothing about quality.
    logits: "smaller" if the finding says that the router's largest logits are, else "".
  """

  words: str
  table: str
  row: str
  against: str
  stabilises: bool = False
  quality: str = ""
  logits: str = ""


FINDINGS = (
  Finding(
    "The router z-loss makes training stable at no cost in quality",
    "4",
    "z_loss_1e-3",
    "baseline",
    True,
    "no worse",
  ),
  Finding(
    "The router z-loss keeps the router's logits small",
    "Sec. 3",
    "z_loss_1e-3",
    "baseline",
    logits="smaller",
  ),
  Finding(
    "The same, where nothing diverges: the z-loss keeps logits small at no cost in quality",
    "Sec. 3",
    "adamw_z_loss_1e-3",
    "adamw",
    quality="no worse",
    logits="smaller",
  ),
  Finding("Without GEGLU it is stable and worse", "2", "no_geglu", "baseline", True, "worse"),
  Finding(
    "Without RMSNorm's scale parameters it is stable and worse",
    "2",
    "no_rms_scale",
    "baseline",
    True,
    "worse",
  ),
  Finding(
    "With input jitter it is stable and worse", "3", "input_jitter", "baseline", True, "worse"
  ),
  Finding("With dropout it is stable and worse", "3", "dropout", "baseline", True, "worse"),
  Finding(
    "With update clipping it is stable and worse", "4", "update_clip", "baseline", True, "worse"
  ),
  Finding(
    "More capacity at evaluation alone helps",
    "8",
    "top_2_0.75_2",
    "top_2_0.75_0.75",
    quality="better",
  ),
  Finding("More capacity in training helps", "8", "top_2_1.25_2", "top_2_0.75_2", quality="better"),
  Finding(
    "Top-2 is better than top-1 with as many slots",
    "8",
    "top_2_1.25_2",
    "top_1_1.25_2",
    quality="better",
  ),
  Finding(
    "Top-3 is better than top-2 with as many slots", "8", "top_3_2_3", "top_2_2_3", quality="better"
  ),
  Finding(
    "Batch-prioritised routing helps where slots are few",
    "18",
    "bpr_0.75_0.75",
    "top_1_0.75_0.75",
    quality="better",
  ),
  Finding(
    "An extra FFN before the experts helps",
    "appendix C",
    "top_2_1.25_2",
    "no_extra_ffn",
    quality="better",
  ),
  Finding(
    "A multiplicative FFN bias helps",
    "appendix C",
    "multiplicative_bias",
    "top_2_1.25_2",
    quality="better",
  ),
)
# The signs of the difference in quality with which a finding holds.
_WANTED = {"better": (1,), "worse": (-1,), "no worse": (0, 1)}


def judge(finding: Finding, outcomes: Mapping[str, Outcome]) -> tuple[str, str]:
  """Returns the verdict on a finding, and the numbers behind it.

  A finding holds if each of its statements holds, and holds in part if some do and some do not.
  Two qualities, over the stable seeds, differ if their means are more than two standard errors of
  the difference apart; the same rule holds for logits, of which each seed's largest counts.
  "Better" and "worse" do not hold if the two do not differ and the paper's own difference is more
  than two standard errors from ours, and are not decided if it is within. A statement is not
  decided if fewer than two seeds of a row are stable, or if there is nothing to stabilise. No
  finding is decided if the row that it is compared with has not learnt more than `LEARNT`.

  Args:
    finding: The finding.
    outcomes: Row -> outcome; both rows of the finding are there.
  """
  one, other = outcomes[finding.row], outcomes[finding.against]
  parts, numbers = [], []
  if finding.stabilises:
    parts.append(
      OPEN if all(other.stable) and all(one.stable) else HOLDS if all(one.stable) else FAILS
    )
    numbers.append(f"stable {one.count} against {other.count}")
  if finding.quality:
    difference = one.mean.minus(other.mean)
    parts.append(_verdict(difference, _WANTED[finding.quality], _effect(finding)))
    numbers.append(f"quality {text(difference, signed=True)}")
  if finding.logits:
    difference = Mean.of(one.logits).minus(Mean.of(other.logits))
    parts.append(_verdict(difference, (-1,)))

    def largest(each):
      return f"{each.value:.3g} ± {each.error:.2g}"

    numbers.append(
      f"largest logit {largest(Mean.of(one.logits))} against {largest(Mean.of(other.logits))}"
    )
  if not other.mean.value > LEARNT:
    base = f"`{finding.against}` has learnt less than bigrams ({LEARNT:g})"
    return OPEN, "; ".join([*numbers, base])
  verdict = (
    PARTLY
    if {HOLDS, FAILS} <= set(parts)
    else FAILS
    if FAILS in parts
    else OPEN
    if OPEN in parts
    else HOLDS
  )
  return verdict, "; ".join(numbers)


def published(outcomes: Mapping[str, Outcome]) -> list[findings.Finding]:
  """Returns the findings with the paper's numbers, for docs/findings.md."""
  made = []
  for finding in FINDINGS:
    if {finding.row, finding.against} <= outcomes.keys():
      verdict, numbers = judge(finding, outcomes)
      *kept, last = numbers.split("; ")
      unlearnt = "has learnt less" in last
      where = f"ST-MoE (2022), {'Table ' * finding.table[0].isdigit()}{finding.table}"
      made.append(
        findings.Finding(
          where,
          finding.words,
          _theirs(finding),
          "; ".join(kept) if unlearnt else numbers,
          verdict,
          last if unlearnt else "",
        )
      )
  return made


def _theirs(finding: Finding) -> str:
  """Returns the paper's numbers on a finding."""
  one, other = (paper.CLAIMS.get(name) for name in (finding.row, finding.against))
  effect = _effect(finding)
  if one is None or other is None or effect is None:
    return "–"
  parts = []
  if finding.stabilises:
    parts.append(f"stable {one.stable}/{one.total} against {other.stable}/{other.total}")
  if finding.quality:
    parts.append(f"quality {effect:+.3f}")
  return "; ".join(parts) or "–"


def _effect(finding: Finding) -> float | None:
  """Returns the paper's difference in quality, or None if it does not give both numbers."""
  one, other = (paper.CLAIMS.get(name) for name in (finding.row, finding.against))
  return None if one is None or other is None else one.quality - other.quality


def _verdict(difference: Mean, wanted: tuple[int, ...], theirs: float | None = None) -> str:
  if difference.sign is None:
    return OPEN
  if difference.sign in wanted:
    return HOLDS
  # The seeds do not tell 0 from an effect as large as the paper's.
  too_small = (
    theirs is not None
    and difference.sign == 0
    and abs(difference.value - theirs) <= 2 * difference.error
  )
  return OPEN if too_small else FAILS


def text(mean: Mean, signed: bool = False) -> str:
  """Returns a mean as in "0.123 ± 0.004", with a dash for what is not known."""

  def number(value, sign):
    return "–" if value != value else f"{value:{sign}.3f}"

  return f"{number(mean.value, '+' if signed else '')} ± {number(mean.error, '')}"
