"""The page of published findings."""

from experiments.common import command_line, findings
from experiments.common.findings import FAILS, HOLDS, OPEN, Finding
from experiments.vowels import table


def test_the_table_by_hand():
  # Catches a verdict without its reason, a study without its link, and counts of another kind.
  made = findings.table(
    {
      "vowels": [Finding("A (1991)", "a", "1", "2 ± 1", HOLDS)],
      "lstm_moe": [Finding("B (2017)", "b", "–", "3", OPEN, "one seed")],
    }
  )
  assert "| a | A (1991) | 1 | 2 ± 1 | **holds** | [`vowels run`](../experiments/vowels/" in made
  assert "| **not decided**: one seed |" in made
  assert made.endswith(
    "Of 2 findings, 1 is of the kind 'holds', 0 are of the kind 'holds in part', 0 are of the kind "
    "'does not hold', and 1 is of the kind 'not decided'."
  )


def test_the_page_is_what_the_results_say(monkeypatch, tmp_path):
  # Catches a page that was not renewed after results or rules changed.
  page = findings.PAGE
  copy = tmp_path / "findings.md"
  copy.write_text(page.read_text())
  monkeypatch.setattr(findings, "PAGE", copy)
  command_line.renew_findings()
  assert copy.read_text() == page.read_text()


def test_a_verdict_can_fail():
  # Catches a rule that is met by any numbers.
  def row(epochs):
    return {"epochs": epochs, "reached": [True] * len(epochs)}

  slow = {"4 experts": row([90, 100, 110]), "BP 6 hidden": row([95, 100, 105])}
  fast = {"4 experts": row([40, 50, 60]), "BP 6 hidden": row([95, 100, 105])}
  assert table.findings({"conditions": {"a": slow}})[0].verdict == FAILS
  assert table.findings({"conditions": {"a": fast}})[0].verdict == HOLDS
  assert table.findings({"conditions": {"a": fast, "b": slow}})[0].verdict == "holds in part"
