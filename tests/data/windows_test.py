import numpy as np
import pytest

from moe_jax.data import make_sources, make_tokenizer, train_iterator, validation_batches, windows
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
BYTES = make_tokenizer("bytes")


def _source(data, name):
  data.sources = (name,)
  return make_sources(data)[0]


def _expected(documents):
  """The flat tokens, one by one."""
  flat = []
  for text in documents:
    flat += [BYTES.boundary, *text]
  return flat + [BYTES.boundary]


def test_flat_tokens(data, words):
  # Catches: a missing boundary, documents in another order, a file made anew on each start.
  source = _source(data, words("a", 9))
  flat = windows.flat_tokens(data, BYTES, source, "train")
  assert flat.tolist() == _expected(source.documents("train"))
  assert windows.flat_tokens(data, BYTES, source, "train").filename == flat.filename


def test_cache_key_has_all_that_changes_tokens(data, words):
  # Catches: tokens of another text, split or tokenizer read from the cache.
  source, name = _source(data, words("a", 9)), data.sources[0]
  files = {windows.flat_tokens(data, BYTES, source, side).filename for side in ("train", "validation")}
  data.validation_fraction = 0.5
  files.add(windows.flat_tokens(data, BYTES, make_sources(data)[0], "train").filename)
  other = make_tokenizer("bytes")
  other.fingerprint = "other"
  files.add(windows.flat_tokens(data, other, source, "train").filename)
  with open(f"{name.partition(':')[2]}/000.txt", "a") as file:
    file.write("more")
  files.add(windows.flat_tokens(data, BYTES, make_sources(data)[0], "train").filename)
  assert len(files) == 5


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("seq_len", [7, 16, 1000])
def test_validation_predicts_each_byte_once(data, words, seq_len, batch_size):
  # Catches: a last window that is dropped, windows that overlap or leave a token out, padding that counts.
  source = _source(data, words("a", 23))
  targets = []
  for b in validation_batches(data, BYTES, source, batch_size, seq_len=seq_len):
    assert b["inputs"].shape == (batch_size, seq_len)
    real = b["segment_ids"] > 0
    assert not b["targets"][~real].any() and not b["inputs"][~real].any()
    targets += b["targets"][real].tolist()
    joined = np.stack([b["inputs"], b["targets"]])[:, real]
    assert (joined[0, 1:] == joined[1, :-1]).all() or batch_size > 1
  documents = list(source.documents("validation"))
  assert len(documents) > 2
  assert targets == _expected(documents)[1:]
  assert BYTES.byte_lengths[targets].sum() == sum(map(len, documents))


def test_few_validation_batches_are_spread_and_always_the_same(data, words):
  # Catches: the first windows only (one document's worth), another choice at each call, more batches than asked for.
  source = _source(data, words("a", 40, size=200))
  whole = np.concatenate([b["inputs"] for b in validation_batches(data, BYTES, source, 1)])
  few, again = ([b["inputs"] for b in validation_batches(data, BYTES, source, 4, 3)] for _ in range(2))
  assert len(few) == 3 and np.array_equal(few, again)
  where = [int(np.flatnonzero((whole == row).all(1))[0]) for row in np.concatenate(few)]
  assert where == sorted(set(where)) and where[-1] > 0.8 * len(whole)
  assert len(list(validation_batches(data, BYTES, source, 4, 10**6))) == -(-len(whole) // 4)


@pytest.mark.parametrize("processes", [2, 4])
def test_validation_over_processes(data, words, processes):
  # Catches: processes that yield different numbers of batches (a hang), rows read twice.
  source = _source(data, words("a", 23))
  one = list(validation_batches(data, BYTES, source, 4))
  parts = [list(validation_batches(data, BYTES, source, 4, process_index=p, process_count=processes))
           for p in range(processes)]
  for i, batch in enumerate(one):
    for name in batch:
      assert np.array_equal(batch[name], np.concatenate([part[i][name] for part in parts]))
  assert {len(part) for part in parts} == {len(one)}


def test_training_sees_every_window_once_an_epoch(data, words):
  # Catches: windows left out or drawn twice; targets that are not the next token.
  source = _source(data, words("a", 30))
  flat = windows.flat_tokens(data, BYTES, source, "train")
  n = (len(flat) - 1) // 16
  it = train_iterator(data, BYTES, [source], 1)
  seen = [next(it) for _ in range(n)]
  expected = sorted(tuple(flat[i * 16:i * 16 + 17].tolist()) for i in range(n))
  assert sorted((*b["inputs"][0].tolist(), int(b["targets"][0, -1])) for b in seen) == expected


def test_a_source_without_a_window(data, words):
  # Catches: Grain's error for a source too short to train on; refusing it where its share is 0.
  short, long = words("short", 3, size=8), words("long", 40)
  data.sources, data.seq_len = (long, short), 64
  sources = make_sources(data)
  with pytest.raises(ConfigError, match="data.sources='text:.*short': .* shorter than one window of data.seq_len=64"):
    train_iterator(data, BYTES, sources, 2)
  data.weights = (1, 0)
  next(train_iterator(data, BYTES, sources, 2))


def test_large_vocabularies_do_not_wrap(data, words):
  # Catches: ids above 65535 stored in 16 bits.
  tokenizer = make_tokenizer("bytes")
  tokenizer.size, tokenizer.boundary, tokenizer.fingerprint = 100_000, 99_999, "large"
  assert windows.flat_tokens(data, tokenizer, _source(data, words("a", 4)), "train").max() == 99_999
