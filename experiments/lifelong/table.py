"""The table of the schedules, and the rule by which the paper's findings hold."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import scipy.stats

from experiments.common import journal, outcomes, tables
from experiments.common.findings import FAILS, HOLDS, OPEN, PARTLY, Finding
from experiments.lifelong.schedule import DOMAINS, METHODS, PHASES

PLAIN, OURS, MIXED = "finetune", "lifelong", "oracle"
RIVALS = ("l2", "replay")
LEAST = 3  # seeds, below which nothing is decided
PAPER = "Lifelong-MoE (2023), abstract"


def first(line: journal.Line) -> list[float]:
  """Returns for each seed the bits per byte of the first distribution after the last phase."""
  return [one[DOMAINS[0]] for one in line["phases"][PHASES[-1]]]


def new(line: journal.Line) -> list[float]:
  """Returns for each seed the mean of the later distributions after the last phase."""
  return [
    statistics.fmean(one[domain] for domain in DOMAINS[1:]) for one in line["phases"][PHASES[-1]]
  ]


def every(line: journal.Line) -> list[float]:
  """Returns for each seed the mean of all distributions after the last phase."""
  return list(line["mean_bits_per_byte"])


def unlearnt(line: journal.Line) -> str:
  """Returns why the model of the first phase has not learnt enough, or "" if it has.

  It has if each seed needs fewer bits per byte of the first distribution than a bigram model.
  """
  bigram = line.get("bigram", {}).get(DOMAINS[0])
  if bigram is None:
    return "no bigram model was fitted"
  worst = max(one[DOMAINS[0]] for one in line["phases"][PHASES[0]])
  return "" if worst < bigram else f"the first model has {worst:.2f} and bigrams {bigram:.2f}"


def difference(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
  """Returns the mean difference of seeds in pairs, and half of its interval of 95 percent.

  The interval is Student's. With fewer than `LEAST` seeds it has no end.
  """
  pairs = [a - b for a, b in zip(mine, theirs, strict=False)]
  mean, error = outcomes.mean_and_error(pairs)
  if len(pairs) < LEAST:
    return mean, float("inf")
  return mean, float(scipy.stats.t.ppf(0.975, len(pairs) - 1)) * error


def verdict(mine: Sequence[float], theirs: Sequence[float]) -> str:
  """Returns whether `mine` is below `theirs`: the interval of the difference says so, or not."""
  mean, half = difference(mine, theirs)
  return HOLDS if mean + half < 0 else FAILS if mean - half > 0 else OPEN


def findings(done: Mapping[str, journal.Line]) -> list[Finding]:
  """Returns the paper's findings, as far as their rows are finished.

  Args:
    done: Row -> its line of results.
  """
  lines = {name: line for name, line in done.items() if "phases" in line}
  if OURS not in lines:
    return []
  ours, why = lines[OURS], unlearnt(lines[OURS])
  made = []
  for words, rivals, measure in (
    ("It forgets less of the first text than plain fine-tuning", (PLAIN,), first),
    ("It is better over all text than online L2 and memory replay", RIVALS, every),
    ("It is better over all text than a dense model trained on all at once", (MIXED,), every),
  ):
    if not lines.keys() >= set(rivals):
      continue
    found = [verdict(measure(ours), measure(lines[name])) for name in rivals]
    shown = ", ".join(
      f"{mean:+.3f} ± {half:.3f} ({name})"
      for name in rivals
      for mean, half in [difference(measure(ours), measure(lines[name]))]
    )
    judged = OPEN if why else combined(found)
    reason = why or ("the interval of the seeds has both signs" if judged == OPEN else "")
    made.append(Finding(PAPER, words, "–", f"{shown} bits per byte", judged, reason))
  return made


def combined(verdicts: Sequence[str]) -> str:
  """Returns the verdict of a finding about several rivals."""
  if len(set(verdicts)) == 1:
    return verdicts[0]
  return PARTLY if HOLDS in verdicts else OPEN


def outcome(line: journal.Line, words: str) -> str:
  """Returns what a row came to: its mean over all text, and what it forgot and learnt."""
  if "phases" not in line:
    return words
  parts = [words, f"first text {_mean(first(line))}, later text {_mean(new(line))} at the end"]
  return "; ".join(parts)


def table(done: Mapping[str, journal.Line]) -> str:
  """Returns Markdown with the bits per byte of each text after each phase.

  Args:
    done: Row -> its line of results.
  """
  lines = {name: done[name] for name in METHODS if "phases" in done.get(name, {})}
  if not lines:
    return "No row is finished."
  names = [domain.removeprefix("embedded:") for domain in DOMAINS]
  # A text is shown from the phase on in which it is learnt.
  cells = [(i, phase) for i in range(len(DOMAINS)) for phase in PHASES[i:]]
  head = [
    "schedule",
    "",
    *(f"{names[i]} after {names[PHASES.index(phase)]}" for i, phase in cells),
    "all, at the end",
  ]
  rows = [
    [
      f"`{name}`",
      METHODS[name].about,
      *(_cell(line, DOMAINS[i], phase) for i, phase in cells),
      f"**{_mean(every(line))}**",
    ]
    for name, line in lines.items()
  ]
  some = next(iter(lines.values()))
  bigrams = ", ".join(f"{value:.2f} of {name}" for name, value in _bigrams(some).items())
  return "\n".join(
    [
      tables.markdown(head, rows, "|---|---|" + "---:|" * (len(cells) + 1)),
      "",
      f"Bits per byte of held-out text, means and standard errors of {some['seeds']} seeds. A "
      f"schedule has {some['steps']} steps and {some['tokens'] / 1e6:.1f}M tokens. Bigram models "
      f"need {bigrams}. The runs were made with Python {some['python']}, "
      f"{tables.versions(some)} on {some['hardware']}.",
    ]
  )


def _bigrams(line: journal.Line) -> dict[str, float]:
  return {name.removeprefix("embedded:"): value for name, value in line["bigram"].items()}


def _cell(line: journal.Line, domain: str, phase: str) -> str:
  found = line["phases"].get(phase)
  return _mean([one[domain] for one in found]) if found else "–"


def _mean(numbers: Sequence[float]) -> str:
  """Returns a mean with its standard error, which one number has not."""
  mean, error = outcomes.mean_and_error(numbers)
  return f"{mean:.3f} ± {error:.3f}" if len(numbers) > 1 else f"{mean:.3f}"
