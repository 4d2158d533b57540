"""Property tests: damaged inputs either work or raise ConfigError.

There are few seeds here, and they are fixed. `mutations.py` takes any seed.
"""

import itertools
import json
import os

import mutations
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.data import (
  batches_of,
  make_sources,
  make_tokenizer,
  train_iterator,
  validation_batches,
)
from moe_jax.data.ladder import _stored, cached_ladder
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
BYTES = make_tokenizer("bytes")
SEEDS = st.integers(0, 2**32 - 1)
short = settings(
  max_examples=50,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXT = "the theA</s><s> \u4e16 zq\n".encode()


def _works(spec):
  """Checks that a tokenizer, if it is accepted, has the properties that `Tokenizer` promises."""
  try:
    tokenizer = make_tokenizer(spec)
    ids = tokenizer.document(TEXT)
    assert ids[0] == tokenizer.boundary and (ids >= 0).all() and (ids < tokenizer.size).all()
    assert tokenizer.byte_lengths.shape == (tokenizer.size,) and tokenizer.byte_lengths.min() >= 0
    tokenizer.decode(ids)
  except ConfigError as error:
    assert error.field == "data.tokenizer" and "\n" not in str(error)


@short
@given(SEEDS)
def test_tokenizer_json(tmp_path, seed):
  # Catches MemoryError, RecursionError, a Rust panic, and a bare Exception of the library.
  (tmp_path / "t.json").write_bytes(mutations.tokenizer_json(seed))
  _works(f"hf:{tmp_path}/t.json")


@short
@given(SEEDS)
def test_sentencepiece_model(tmp_path, sentencepiece_file, seed):
  # Catches RuntimeError and UnicodeDecodeError of the library.
  (tmp_path / "m.model").write_bytes(mutations.mutate_bytes(sentencepiece_file.read_bytes(), seed))
  _works(f"sentencepiece:{tmp_path}/m.model")


@short
@given(SEEDS, st.sampled_from(["text", "jsonl"]))
def test_files(data, tmp_path, seed, kind):
  # Catches RecursionError, UnicodeError and KeyError for unusual lines, and documents that overlap
  # or lose bytes.
  path = tmp_path / f"{kind}.{kind}"
  path.write_bytes(content := getattr(mutations, kind)(seed))
  data.sources, data.validation_fraction = (f"{kind}:{path}",), 0.3
  try:
    (source,) = make_sources(data)
    documents = dict((d.key(i), d[i]) for d in source.splits.values() for i in range(len(d)))
  except ConfigError as error:
    assert error.field in ("data.sources", "data.text_field") and "\n" not in str(error)
  else:
    in_order = [
      documents[key] for key in sorted(documents, key=lambda key: int(key.rpartition(":")[2]))
    ]
    assert kind == "jsonl" or b"".join(in_order) == content


@pytest.fixture
def source(data, words):
  data.sources = (words("a", 12),)
  return make_sources(data)[0]


@short
@given(SEEDS)
def test_caches(data, source, tmp_path, seed):
  # Catches damage that the digest does not detect, and an error although the file could be built
  # again.
  first = [batch["inputs"].tolist() for batch in validation_batches(data, BYTES, source, 2)]
  figures = cached_ladder("k", lambda: ([TEXT], [TEXT]), tmp_path / "ladder")
  for path in itertools.chain((tmp_path / "cache").iterdir(), (tmp_path / "ladder").iterdir()):
    path.write_bytes(mutations.mutate_bytes(path.read_bytes(), seed))
    os.utime(path, ns=(seed, seed))
  assert first == [batch["inputs"].tolist() for batch in validation_batches(data, BYTES, source, 2)]
  assert _stored(next((tmp_path / "ladder").iterdir())) in (None, figures)
  assert cached_ladder("k", lambda: ([TEXT], [TEXT]), tmp_path / "ladder") == figures


@short
@given(SEEDS, st.sampled_from(["windows", "stream"]))
def test_states(data, source, seed, pipeline):
  # Catches KeyError, TypeError and OverflowError for a damaged position, and a position that is
  # read as another number.
  data.pipeline = pipeline
  it = train_iterator(data, BYTES, [source], 4)
  whole = it.get_state()
  state = mutations.mutate_json(whole, seed)
  try:
    it.set_state(state)
    batch = next(it)
    assert batches_of(state) == (state.get("batches") if pipeline == "stream" else state["batches"])
  except ConfigError as error:
    assert error.field in ("checkpoint", "data.pipeline", "train.batch_size") and "\n" not in str(
      error
    )
  else:
    assert batch["inputs"].shape == (4, 16) and np.all(
      (batch["inputs"] >= 0) & (batch["inputs"] < BYTES.size)
    )


def test_mutations_are_functions_of_their_seed():
  # Catches damage that cannot be reproduced from the seed that a failure names, and seeds that all
  # lead to the same damage.
  for make in (
    mutations.tokenizer_json,
    mutations.jsonl,
    mutations.text,
    lambda seed: json.dumps(mutations.mutate_json({"a": [1, 2, {"b": 3}]}, seed)),
    lambda seed: mutations.mutate_bytes(TEXT * 9, seed),
  ):
    assert [make(seed) for seed in range(20)] == [make(seed) for seed in range(20)]
    assert len({make(seed) for seed in range(40)}) > 15
