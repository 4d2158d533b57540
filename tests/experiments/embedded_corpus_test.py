"""The README's tables are what the runs' results say."""

import pytest

from experiments.embedded_corpus import table

pytestmark = pytest.mark.unit


def test_the_readme_shows_the_results():
  # Catches: a table typed by hand; results replaced without `python -m
  # experiments.embedded_corpus.table --write`.
  text = table.README.read_text()
  assert table.replace(text) == text


@pytest.mark.parametrize("name, rung", [("quickstart", "trigram"), ("desk", "4-gram")])
def test_the_models_beat_what_the_readme_says_they_beat(name, rung):
  # Catches: results of a worse run put under the same claim.
  assert table.load(name)
  for run in table.load(name):
    for domain, ladder in run["ladder"].items():
      assert run["bits_per_byte"][domain] < ladder[rung], (run["seed"], domain)


def test_model_and_twin_read_the_same_text_for_as_long():
  # Catches: a twin that was trained on another Python's text, on more tokens, or that is wider than
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
