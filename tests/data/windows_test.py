import pathlib

import numpy as np
import pytest

from moe_jax.data import (
  cache,
  make_sources,
  make_tokenizer,
  train_iterator,
  validation_batches,
  windows,
)
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
BYTES = make_tokenizer("bytes")


def _source(data, name):
  data.sources = (name,)
  return make_sources(data)[0]


def _expected(documents):
  """Returns the flat tokens as a list, built token by token."""
  flat = []
  for text in documents:
    flat += [BYTES.boundary, *text]
  return flat + [BYTES.boundary]


def test_flat_tokens(data, words):
  # Catches a missing boundary, documents in another order, and a file that is written again at each
  # start.
  source = _source(data, words("a", 9))
  flat = windows.flat_tokens(data, BYTES, source, "train")
  assert flat.tolist() == _expected(source.documents("train"))
  assert windows.flat_tokens(data, BYTES, source, "train").filename == flat.filename


def test_cache_key_has_all_that_changes_tokens(data, words):
  # Catches tokens of another text, split or tokenizer that are read from the cache.
  source, name = _source(data, words("a", 9)), data.sources[0]
  files = {
    windows.flat_tokens(data, BYTES, source, side).filename for side in ("train", "validation")
  }
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
  # Catches a last window that is dropped, windows that overlap or leave out a token, and padding
  # that counts as targets.
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
  # Catches a choice of the first windows only, which may be one document, a choice that differs
  # between calls, and more batches than asked for.
  source = _source(data, words("a", 40, size=200))
  whole = np.concatenate([b["inputs"] for b in validation_batches(data, BYTES, source, 1)])
  few, again = (
    [b["inputs"] for b in validation_batches(data, BYTES, source, 4, 3)] for _ in range(2)
  )
  assert len(few) == 3 and np.array_equal(few, again)
  where = [int(np.flatnonzero((whole == row).all(1))[0]) for row in np.concatenate(few)]
  assert where == sorted(set(where)) and where[-1] > 0.8 * len(whole)
  assert len(list(validation_batches(data, BYTES, source, 4, 10**6))) == -(-len(whole) // 4)


@pytest.mark.parametrize("processes", [2, 4])
def test_validation_over_processes(data, words, processes):
  # Catches processes that yield different numbers of batches, which would hang, and rows that are
  # read twice.
  source = _source(data, words("a", 23))
  one = list(validation_batches(data, BYTES, source, 4))
  parts = [
    list(validation_batches(data, BYTES, source, 4, process_index=p, process_count=processes))
    for p in range(processes)
  ]
  for i, batch in enumerate(one):
    for name in batch:
      assert np.array_equal(batch[name], np.concatenate([part[i][name] for part in parts]))
  assert {len(part) for part in parts} == {len(one)}


def test_training_sees_every_window_once_an_epoch(data, words):
  # Catches windows that are left out or drawn twice, and targets that are not the next tokens.
  source = _source(data, words("a", 30))
  flat = windows.flat_tokens(data, BYTES, source, "train")
  n = (len(flat) - 1) // 16
  it = train_iterator(data, BYTES, [source], 1)
  seen = [next(it) for _ in range(n)]
  expected = sorted(tuple(flat[i * 16 : i * 16 + 17].tolist()) for i in range(n))
  assert sorted((*b["inputs"][0].tolist(), int(b["targets"][0, -1])) for b in seen) == expected


def test_a_source_without_a_window(data, words):
  # Catches Grain's error for a source that is too short to train on, and a refusal of such a source
  # although its share is 0.
  short, long = words("short", 3, size=8), words("long", 40)
  data.sources, data.seq_len = (long, short), 64
  sources = make_sources(data)
  with pytest.raises(
    ConfigError, match="data.sources='text:.*short': .* shorter than one window of data.seq_len=64"
  ):
    train_iterator(data, BYTES, sources, 2)
  data.weights = (1, 0)
  next(train_iterator(data, BYTES, sources, 2))


def test_large_vocabularies_do_not_wrap(data, words):
  # Catches ids above 65535 that are stored in 16 bits.
  tokenizer = make_tokenizer("bytes")
  tokenizer.size, tokenizer.boundary, tokenizer.fingerprint = 100_000, 99_999, "large"
  assert windows.flat_tokens(data, tokenizer, _source(data, words("a", 4)), "train").max() == 99_999


DAMAGE = {
  "cut": lambda whole: whole[: len(whole) // 2],
  "0xff": lambda whole: b"\xff" * len(whole),
  "flipped": lambda whole: whole[:21] + bytes([whole[21] ^ 1]) + whole[22:],
  "empty": lambda whole: b"",
  "of an earlier version": lambda whole: whole[:-48],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_tokens_are_made_anew(data, words, capfd, damage):
  # Catches training or evaluating on garbage because the content of a file is not checked.
  source = _source(data, words("a", 9))
  for side in ("train", "validation"):
    path = pathlib.Path(windows.flat_tokens(data, BYTES, source, side).filename)
    path.write_bytes(damage(path.read_bytes()))
    assert windows.flat_tokens(data, BYTES, source, side).tolist() == _expected(
      source.documents(side)
    )
    assert f"{path} is damaged" in capfd.readouterr().err


def test_ids_beyond_the_embedding_never_reach_a_model(data, words):
  # Catches a file whose digest is right but whose ids are too high, and a tokenizer that returns
  # ids that are too high.
  source = _source(data, words("a", 9))
  path = pathlib.Path(windows.flat_tokens(data, BYTES, source, "train").filename)
  cache.replace(path, lambda file: file.write(np.array([256, 264, 256], "<u2").tobytes()))
  assert windows.flat_tokens(data, BYTES, source, "train").tolist() == _expected(
    source.documents("train")
  )
  wrong = make_tokenizer("bytes")
  wrong.encode, wrong.fingerprint = (lambda text: np.array([3, 264], np.int32)), "wrong"
  with pytest.raises(
    ConfigError, match="data.tokenizer='bytes': gives the id 264, but its ids are below 264"
  ):
    windows.flat_tokens(data, wrong, source, "train")
  assert not list(path.parent.glob("*.tmp"))
  data.pipeline = "stream"
  with pytest.raises(ConfigError, match="data.tokenizer='bytes': gives the id 264"):
    next(train_iterator(data, wrong, [source], 2))


def test_tokens_that_are_written_to_during_training(data, words):
  # Catches a process that the system kills because a file was truncated, and one that continues to
  # train.
  source = _source(data, words("a", 30))
  it = train_iterator(data, BYTES, [source], 2)
  next(it)
  with open(windows.flat_tokens(data, BYTES, source, "train").filename, "r+b") as file:
    file.truncate(10)
  with pytest.raises(ConfigError, match="data.cache_dir=.*tokens-.* was written to"):
    next(it)


def test_documents_end_with_eos_where_it_is_set(data, words):
  # Catches a data.eos that is not written or written twice, and tokens without it that are read
  # from the cache in place of tokens with it.
  source, tokenizer = _source(data, words("a", 9)), make_tokenizer("bytes")
  plain = windows.flat_tokens(data, tokenizer, source, "train").tolist()
  tokenizer.eos, tokenizer.fingerprint = 257, "bytes with an end"
  expected = []
  for text in source.documents("train"):
    expected += [256, *text, 257]
  assert windows.flat_tokens(data, tokenizer, source, "train").tolist() == [*expected, 256]
  assert [t for t in expected if t != 257] + [256] == plain
  data.pipeline = "stream"
  it = train_iterator(data, tokenizer, [source], 1, 50)
  stream = [t for _ in range(9) for t in next(it)["targets"][0].tolist()]
  assert 257 in stream and all(
    b == 256 for a, b in zip(stream, stream[1:], strict=False) if a == 257
  )


def test_another_boundary_is_another_file(data, words):
  # Catches tokens with another boundary that are read from the cache because the file of the
  # tokenizer is the same.
  source, other = _source(data, words("a", 4)), make_tokenizer("bytes")
  windows.flat_tokens(data, BYTES, source, "train")
  other.boundary = 258
  assert windows.flat_tokens(data, other, source, "train")[0] == 258
