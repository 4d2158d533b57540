"""Checks that the README says what the results of the runs say."""

import pytest

from experiments import desk_twins
from experiments.common import journal, tables
from experiments.desk_twins import table

pytestmark = pytest.mark.unit


def test_the_readme_and_the_figure_show_the_results():
  # Catches a table typed by hand, and results replaced without `python -m experiments desk_twins
  # write`.
  text = (desk_twins.HERE / "README.md").read_text()
  assert tables.replace_all(text, desk_twins.STUDY.table("desk")) == text
  figure = table.figure(journal.load(desk_twins.RESULTS))
  assert (desk_twins.HERE / "differences.svg").read_text() == figure


def test_a_difference_is_experts_minus_twin():
  # Catches an experiment whose sign is turned, and a family of which only one run is finished.
  def run(value):
    return {"bits_per_byte": {"embedded:prose": value}}

  done = {"glam": run(2.0), "dense_glam": run(2.5), "dbrx": run(1.0)}
  (finding,) = table.findings(done)
  assert finding.ours == "1 of 1 families"
  assert "glam" in table.figure(done) and "dbrx" not in table.figure(done)
