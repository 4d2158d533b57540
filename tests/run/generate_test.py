"""Text is generated with a model of random weights, and with one whose next byte is known."""

import numpy as np
import pytest
import saved_run

import moe_jax
from moe_jax.run.generate import _Text
from moe_jax.run.text_model import text_model

pytestmark = pytest.mark.smoke
PROMPTS = ["the expert", "a"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The model of a run, ready to decode."""
  return text_model(saved_run.save(tmp_path_factory.mktemp("run"))[0])


def test_prompts_are_continued_as_if_alone(run):
  # Catches a prompt that the padding of a shorter one changes, texts in another order, and a seed
  # that is not used.
  together = moe_jax.generate(run, PROMPTS, max_tokens=6)
  assert together == [moe_jax.generate(run, prompt, max_tokens=6) for prompt in PROMPTS]
  options = {"max_tokens": 6, "temperature": 2.0}
  assert moe_jax.generate(run, "a", seed=1, **options) != moe_jax.generate(
    run, "a", seed=2, **options
  )


def test_pieces_are_the_text(run):
  # Catches a piece that is repeated, left out or of another prompt, and another text than without
  # streaming.
  pieces = {0: [], 1: []}
  options = {"max_tokens": 12, "temperature": 2.0, "top_k": 50}
  texts = moe_jax.generate(
    run, PROMPTS, on_text=lambda row, new: pieces[row].append(new), **options
  )
  assert texts == moe_jax.generate(run, PROMPTS, **options)
  assert texts == ["".join(pieces[row]) for row in (0, 1)]
  # Random bytes are rarely UTF-8, so pieces are fewer than tokens.
  assert all(len(row) > 1 for row in pieces.values())


def test_a_text_ends_before_a_text_to_stop_at(run):
  # Catches a stop text that is shown, and one that is found in the middle of a later text only.
  options = {"max_tokens": 12, "temperature": 2.0}
  free = moe_jax.generate(run, "a", **options)
  stop = free[3:5]
  assert moe_jax.generate(run, "a", stop=[stop], **options) == free[: free.index(stop)]


def test_what_may_still_change_is_not_shown():
  # Catches half a character, and the beginning of a stop text, on the terminal.
  text = _Text(bytes, [256], ["END"])
  shown = []
  for token in [*"né".encode(), *b" E", *b"x", *b"EN", *b"D", *b"later"]:
    text.add(np.asarray([token]))
    shown.append(text.grow())
  assert shown[:6] == ["n", "", "é", " ", "", "Ex"]
  assert "".join(shown) == text.shown == "né Ex" and text.is_complete


def test_the_end_of_a_document_ends_the_text():
  # Catches a boundary that is shown as text, and tokens after it.
  text = _Text(bytes, [256], [])
  text.add(np.asarray([104, 105, 256, 33, -1]))
  assert text.grow() == "hi" and text.is_complete


@pytest.mark.parametrize(
  "options, words",
  [
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": -1.0}, "temperature"),
    ({"stop": [""]}, "stop"),
    ({"prompts": []}, "prompts"),
  ],
)
def test_mistakes_are_one_sentence(options, words):
  # Catches an error that comes after the run was loaded.
  with pytest.raises(moe_jax.ConfigError, match=words):
    moe_jax.generate("no such run", **({"prompts": "a"} | options))
