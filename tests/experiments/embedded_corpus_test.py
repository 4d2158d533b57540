"""Checks that the README's tables say what the results of the runs say."""

import json

import pytest

from experiments.common import study, tables
from experiments.embedded_corpus import STUDY, table

pytestmark = pytest.mark.unit


def test_the_readme_shows_the_results():
  # Catches a table typed by hand, and results replaced without `python -m experiments
  # embedded_corpus write`.
  text = table.README.read_text()
  assert tables.replace_all(text, STUDY.table("desk")) == text
  assert (table.HERE / "ladder.svg").read_text() == table.figure()


@pytest.mark.parametrize("name, rung", [("quickstart", "trigram"), ("desk", "4-gram")])
def test_the_models_beat_what_the_readme_says_they_beat(name, rung):
  # Catches results of a worse run put under the same claim.
  assert table.load(name)
  for run in table.load(name):
    for domain, ladder in run["ladder"].items():
      assert run["bits_per_byte"][domain] < ladder[rung], (run["seed"], domain)


def test_model_and_twin_read_the_same_text_for_as_long():
  # Catches a twin that was trained on another Python's text, on more tokens, or that is wider than
  # a token's experts.
  pairs = [
    (run, twin)
    for name in table.MODELS
    for run in table.load(name)
    for twin in table.load(f"dense_{name}")
  ]
  assert pairs
  for run, twin in pairs:
    assert (run["data"], run["tokens"]) == (twin["data"], twin["tokens"])
    assert run["flops_per_token"] == pytest.approx(
      twin["flops_per_token"], rel=0.02
    )  # the router's


def test_a_finished_row_is_kept_as_a_file(tmp_path, monkeypatch):
  # Catches a result that stays in the workdir, one that is trained though its file is here, and a
  # diverged run that ends the study.
  def run(rows, results, workdir, *_, **__):
    assert list(rows) == ["quickstart_seed1", "desk"]
    (workdir / "desk").mkdir(parents=True)
    (workdir / "desk" / "results.json").write_text(json.dumps(dict.fromkeys(table.KEPT, 1)))

  monkeypatch.setattr(table, "HERE", tmp_path)
  monkeypatch.setattr(table.sweep, "run", run)
  (tmp_path / "quickstart.json").write_text('{"seed": 0}')
  rows = {name: table.ROWS[name] for name in ("quickstart", "quickstart_seed1", "desk")}
  table.train(study.Job("desk", rows, tmp_path, tmp_path / "runs"))
  assert list(STUDY.load(tmp_path)) == ["quickstart", "desk"]
