"""Tests that span corruption loses no token, masks the right share, and is reproducible."""

import dataclasses
import json

import numpy as np
import pytest

from moe_jax.data import (
  make_sources,
  make_tokenizer,
  train_iterator,
  validation_batches,
  vocab_size,
)
from moe_jax.data.span_corruption import SpanCorruption, corrupt, lengths, raw_length, restore
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
BYTES = make_tokenizer("bytes")
SENTINELS = 1000 + np.arange(99, -1, -1)
FIELDS = {
  "encoder_tokens": 24,
  "encoder_segment_ids": 24,
  "encoder_positions": 24,
  "inputs": 16,
  "targets": 16,
  "segment_ids": 16,
  "positions": 16,
}


def test_by_hand():
  # Of ten tokens, 40% are masked in spans of 2, so there are two spans. Catches sentinels in the
  # wrong order, a missing last sentinel, a first token that is masked, and a last one that is not.
  inputs, targets = corrupt(np.arange(10), np.random.default_rng(0), 0.4, 2.0, SENTINELS)
  assert [t for t in inputs if t >= 1000] == [1099, 1098] and inputs[0] == 0 and inputs[-1] == 1098
  assert (
    [t for t in targets if t >= 1000] == [1099, 1098, 1097]
    and targets[0] == 1099
    and targets[-1] == 1097
  )
  assert targets[-2] == 9 and len(inputs) == 8 and len(targets) == 7


def test_restores_any_text():
  # Catches, in 200 draws, a token that is in both inputs and targets or in neither, a span after
  # the sentinel of another span, a sentinel that is used twice, an empty span or stretch, lengths
  # other than those of `lengths`, and tokens that no draw ever masks.
  rng, masked_at, spans_of = np.random.default_rng(0), np.zeros(200), []
  for _ in range(200):
    n = int(rng.integers(150, 200))
    ids = rng.permutation(1000)[:n]
    inputs, targets = corrupt(ids, rng, 0.15, 3.0, SENTINELS)
    made = lengths(n, 0.15, 3.0)
    assert (len(inputs), len(targets)) == (made.inputs, made.targets)
    np.testing.assert_array_equal(restore(inputs, targets, SENTINELS), ids)
    kept, masked = inputs[inputs < 1000], targets[targets < 1000]
    assert sorted([*kept, *masked]) == sorted(ids)
    assert abs(len(masked) / n - 0.15) < 0.01 and abs(len(masked) / made.spans - 3) < 0.3
    marks, ends = inputs[inputs >= 1000], targets[targets >= 1000]
    np.testing.assert_array_equal(ends[:-1], marks)
    assert len(set(ends)) == len(ends) == made.spans + 1 and targets[-1] == ends[-1]
    spans_of += [*np.diff(np.flatnonzero(targets >= 1000)) - 1]
    assert min(spans_of) >= 1 and not np.any((inputs[1:] >= 1000) & (inputs[:-1] >= 1000))
    masked_at[:n] += np.isin(ids, masked)
  assert 1 in spans_of and max(spans_of) > 5 and masked_at[0] == 0 and np.all(masked_at[1:150] > 5)


@pytest.mark.parametrize(
  "tokens, density, mean, expected",
  [
    (2, 0.15, 3.0, (1, 1, 2, 3)),
    (569, 0.15, 3.0, (85, 28, 512, 114)),
    (10, 0.9, 1.0, (9, 1, 2, 11)),
    (100, 0.5, 10.0, (50, 5, 55, 56)),
  ],
)
def test_lengths(tokens, density, mean, expected):
  # Catches more spans than unmasked stretches, and a short text without a masked token.
  assert lengths(tokens, density, mean) == expected


def test_raw_length():
  # These are T5's lengths 512 and 114 (Sec. 3.1.4). T5 has 568 tokens, because an end-of-sequence
  # id takes one of the 512. Catches a window that does not fill a row or overflows it, and one that
  # ignores the stricter of the two limits.
  assert raw_length(512, 114, 0.15, 3.0) == 569
  for encoder_len, target_len in ((512, 50), (100, 114), (2, 3), (64, 16)):
    n = raw_length(encoder_len, target_len, 0.15, 3.0)
    made, more = lengths(n, 0.15, 3.0), lengths(n + 1, 0.15, 3.0)
    assert made.inputs <= encoder_len and made.targets <= target_len
    assert more.inputs > encoder_len or more.targets > target_len
  with pytest.raises(ConfigError, match="data.encoder_len=1"):
    raw_length(1, 16, 0.15, 3.0)
  with pytest.raises(ConfigError, match="data.seq_len=2"):
    raw_length(16, 2, 0.15, 3.0)


def test_a_row():
  # Catches inputs that are not the shifted targets, padding whose segment is not 0, positions that
  # continue into the padding, and spans that do not depend on the key.
  make = SpanCorruption(0.3, 2.0, 24, 16, 264, 256, 0)
  ids = np.arange(20)
  row = make.example(ids, "train", 5)
  assert {name: len(values) for name, values in row.items()} == FIELDS
  made = lengths(20, 0.3, 2.0)
  real = row["segment_ids"] > 0
  assert (
    real.sum() == made.targets and (row["encoder_segment_ids"] > 0).sum() == made.inputs and real[0]
  )
  assert row["inputs"][0] == 256 and np.array_equal(
    row["inputs"][1 : made.targets], row["targets"][: made.targets - 1]
  )
  assert all(not np.any(row[name][~real]) for name in ("inputs", "targets", "positions"))
  assert np.array_equal(row["positions"][real], np.arange(made.targets))
  np.testing.assert_array_equal(
    restore(row["encoder_tokens"][: made.inputs], row["targets"][: made.targets], make.sentinels),
    ids,
  )
  assert make.sentinels[0] == 363 and make.sentinels[-1] == 264

  def same(other):
    return all(np.array_equal(row[name], other[name]) for name in row)

  assert same(make.example(ids, "train", np.int64(5))) and not same(make.example(ids, "train", 6))
  assert not same(dataclasses.replace(make, seed=1).example(ids, "train", 5))
  assert not any(map(np.any, make.example(ids[:1], "train", 5).values()))


def test_many_spans_get_more_sentinels():
  # Catches a sentinel that stands for two spans. A row of 1024 targets has about 256 spans of 3,
  # which are more than T5 has sentinels.
  make = SpanCorruption(0.5, 3.0, 1024, 1024, 264, 256, 0)
  marks = make.sentinels
  assert len(marks) == len(set(marks.tolist())) == lengths(make.raw, 0.5, 3.0).spans + 1 > 200
  row = make.example(np.zeros(make.raw, np.int32))
  assert row["encoder_segment_ids"].sum() >= 1023 and row["segment_ids"].sum() == 1024


@pytest.fixture
def setup(data, words):
  data.sources, data.weights, data.objective = (
    (words("a", 12), words("b", 25)),
    (0.3, 0.7),
    "span_corruption",
  )
  data.noise_density, data.mean_span = 0.3, 2.0
  return data, make_sources(data)


def _take(it, n):
  return [next(it) for _ in range(n)]


def _equal(a, b):
  return len(a) == len(b) and all(
    np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x | y
  )


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("pipeline", ["windows", "stream"])
def test_training_batches(setup, pipeline, threads):
  # Catches spans that depend on the process or thread, and a resumed run that masks other spans.
  data, sources = setup
  data.pipeline, data.threads = pipeline, threads
  it = train_iterator(data, BYTES, sources, 4)
  whole = _take(it, 12)
  assert {name: (v.shape, v.dtype.name) for name, v in whole[0].items()} == {
    name: ((4, length), "int32") for name, length in FIELDS.items()
  }
  for process in (0, 1):
    parts = _take(
      train_iterator(data, BYTES, sources, 4, process_index=process, process_count=2), 12
    )
    assert _equal(
      [{k: v[2 * process : 2 * process + 2] for k, v in b.items()} for b in whole], parts
    )
  state = json.loads(json.dumps(it.get_state()))
  ahead = _take(it, 5)
  fresh = train_iterator(data, BYTES, sources, 4)
  fresh.set_state(state)
  assert _equal(_take(fresh, 5), ahead)
  it.close(), fresh.close()
  marks = SpanCorruption(0.3, 2.0, 24, 16, 264, 256, 0).sentinels
  texts = b"".join(text for source in sources for text in source.documents("train"))
  text = BYTES.decode(restore(whole[0]["encoder_tokens"][1], whole[0]["targets"][1], marks)[:12])
  assert text and text.split(b" ")[1] in texts
  assert vocab_size(data, BYTES) == 264 + 100 > max(b["targets"].max() for b in whole) > 264


def test_each_epoch_masks_other_spans(setup):
  # Catches spans that depend only on the window, so that a model sees the same spans masked in each
  # epoch.
  data, sources = setup
  data.weights = ()
  marks = SpanCorruption(0.3, 2.0, 24, 16, 264, 256, 0).sentinels
  rows = {}
  for batch in _take(train_iterator(data, BYTES, sources, 8), 60):
    for x, y in zip(batch["encoder_tokens"], batch["targets"], strict=True):
      rows.setdefault(restore(x, y, marks).tobytes(), []).append(x.tobytes())
  seen = [row for row in rows.values() if len(row) > 3]
  assert seen and all(len(set(row)) > 1 for row in seen)


def test_validation_holds_each_token_once(setup):
  # Catches text between windows that is lost or repeated, spans that differ between evaluations,
  # and a shorter last window that is lost.
  data, sources = setup
  corruption = SpanCorruption(0.3, 2.0, 24, 16, 264, 256, 0)
  batches = list(validation_batches(data, BYTES, sources[0], 4))
  assert _equal(batches, list(validation_batches(data, BYTES, sources[0], 4)))
  rows = [{name: b[name][i] for name in b} for b in batches for i in range(4)]
  found = []
  for row in rows:
    inputs, targets = row["encoder_tokens"], row["targets"]
    found.append(
      restore(
        inputs[row["encoder_segment_ids"] > 0],
        targets[row["segment_ids"] > 0],
        corruption.sentinels,
      )
      if row["segment_ids"].any()
      else np.zeros(0, np.int32)
    )
  text = np.concatenate(found)
  expected = np.concatenate(
    [np.append(256, BYTES.encode(d)) for d in sources[0].documents("validation")]
  )
  assert len(expected) - len(text) <= 1  # A last window of one token cannot be masked.
  np.testing.assert_array_equal(text, expected[: len(text)])
