import subprocess
import sys

import pytest

from moe_jax import data as data_package
from moe_jax.data import fingerprints, make_sources
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "names, remedy",
  [
    (("embeded:prose",), "did you mean 'embedded'"),
    (("prose",), "known: embedded, text, jsonl, tfds"),
    (("text:",), "names nothing"),
    (("embedded",), "names nothing"),
    ((), "at least one source"),
  ],
)
def test_names_that_mean_nothing(data, names, remedy):
  # Catches an error that does not name the field or the remedy.
  data.sources = names
  with pytest.raises(ConfigError, match=f"data.sources=.*{remedy}"):
    make_sources(data)


def test_twice_the_same(data, words):
  # Catches two sources with the same name, whose results would overwrite each other.
  data.sources = (words("a", 4),) * 2
  with pytest.raises(ConfigError, match="named twice"):
    make_sources(data)


def test_order_and_fingerprints(data, words):
  # Catches sources that are in another order than their weights.
  data.sources = (words("b", 4), words("a", 4))
  sources = make_sources(data)
  assert [s.name for s in sources] == list(data.sources)
  assert fingerprints(sources) == {s.name: s.fingerprint for s in sources}
  assert {len(f) for f in fingerprints(sources).values()} == {64}


def test_imports_are_lazy():
  # Catches imports that take seconds in programs that only look at a config.
  script = (
    "import sys, moe_jax.data\n"
    "print([m for m in ('grain', 'tensorflow_datasets', 'sentencepiece', 'tokenizers') if m in "
    "sys.modules])"
  )
  root = str(data_package.__path__[0]) + "/../.."
  out = subprocess.run(
    [sys.executable, "-c", script], env={"PYTHONPATH": root}, capture_output=True, text=True
  )
  assert out.stdout.strip() == "[]", out
