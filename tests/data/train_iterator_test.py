"""Tests what both pipelines promise: the same global order for all processes, and exact resume."""

import json

import numpy as np
import pytest

from moe_jax.data import PIPELINES, make_sources, make_tokenizer, train_iterator
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.conformance
BYTES = make_tokenizer("bytes")


@pytest.fixture
def setup(data, words):
  data.sources, data.weights = (words("a", 12), words("b", 25)), (0.3, 0.7)
  return data, make_sources(data)


def _take(it, n):
  return [next(it) for _ in range(n)]


def _equal(a, b):
  return len(a) == len(b) and all(
    np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x | y
  )


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_batches_are_batches(setup, pipeline):
  # Catches a missing key, another dtype, and targets that are not the next inputs of the same row.
  data, sources = setup
  data.pipeline = pipeline
  for batch in _take(train_iterator(data, BYTES, sources, 4, 16), 5):
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
      k: ((4, 16), "int32") for k in ("inputs", "targets", "segment_ids", "positions")
    }
    assert np.array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert (batch["segment_ids"][:, 0] == 1).all() and (batch["positions"][:, 0] == 0).all()


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_global_order_for_any_number_of_processes(setup, pipeline, processes):
  # Catches shuffling or packing that is done within a process.
  data, sources = setup
  data.pipeline = pipeline
  whole = _take(train_iterator(data, BYTES, sources, 4), 12)
  parts = [
    _take(train_iterator(data, BYTES, sources, 4, process_index=p, process_count=processes), 12)
    for p in range(processes)
  ]
  joined = [
    {k: np.concatenate([b[k] for b in step]) for k in step[0]} for step in zip(*parts, strict=True)
  ]
  assert _equal(whole, joined)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_resume_is_exact(setup, pipeline, threads):
  # Catches a state that counts prefetched batches, one that cannot be written as JSON, and a
  # restored iterator that repeats a batch.
  data, sources = setup
  data.pipeline, data.threads = pipeline, threads
  it = train_iterator(data, BYTES, sources, 4)
  for n in (0, 1, 7):
    _take(it, n)
    state = json.loads(json.dumps(it.get_state()))
    ahead = _take(it, 5)
    fresh = train_iterator(data, BYTES, sources, 4)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert _equal(_take(fresh, 5), ahead)
    fresh.close()
    it.set_state(state)  # This rewinds the same iterator.
    assert _equal(_take(it, 5), ahead)
  it.close()


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("objective", ["next_token", "span_corruption"])
def test_changed_shares_survive_a_kill(setup, objective, threads):
  # Catches shares or places of sources that the state lacks, batches that were read ahead with the
  # old shares, and spans that are masked as at the start of the run.
  data, sources = setup
  data.objective, data.threads = objective, threads
  it = train_iterator(data, BYTES, sources, 4)
  _take(it, 3)
  it.change_shares([0.9, 0.1])
  _take(it, 2)
  it.change_shares([0.123456789, 0.876543211])
  for n in (0, 3):
    _take(it, n)
    state = json.loads(json.dumps(it.get_state()))
    ahead = _take(it, 4)
    fresh = train_iterator(data, BYTES, sources, 4)
    fresh.set_state(state)
    assert (fresh.get_state(), fresh.shares) == (state, [0.123456789, 0.876543211])
    assert _equal(_take(fresh, 4), ahead)
    # The shares of the first batch again, which is another order than the one that is read on.
    fresh.take_shares({})
    assert fresh.shares == [0.3, 0.7]
    fresh.take_shares(state)
    assert fresh.shares == it.shares
    fresh.close()
    it.set_state(state)
  it.close()


def test_changed_shares_for_any_number_of_processes(setup):
  # Catches a place of the sources that counts the rows of one process.
  data, sources = setup
  its = [train_iterator(data, BYTES, sources, 4)]
  its += [
    train_iterator(data, BYTES, sources, 4, process_index=p, process_count=2) for p in range(2)
  ]
  for it in its:
    _take(it, 3)
    it.change_shares([0.8, 0.2])
  whole, *parts = (_take(it, 6) for it in its)
  joined = [{k: np.concatenate([x[k], y[k]]) for k in x} for x, y in zip(*parts, strict=True)]
  assert _equal(whole, joined)
  assert its[0].get_state() == its[1].get_state() == its[2].get_state()


def test_every_window_is_read_once_before_any_is_read_again(setup):
  # Catches windows that are skipped or repeated where the shares change.
  data, sources = setup
  it = train_iterator(data, BYTES, sources, 2)
  seen = []
  for shares in ([0.5, 0.5], [0.25, 0.75], [0.9, 0.1]):
    it.change_shares(shares)
    seen += [tuple(row) for batch in _take(it, 4) for row in batch["inputs"].tolist()]
  assert len(seen) == len(set(seen)) == 24


def test_windows_resume_on_another_number_of_processes(setup):
  # Catches a state that counts the rows of one process.
  data, sources = setup
  its = [
    train_iterator(data, BYTES, sources, 4, process_index=p, process_count=4) for p in range(4)
  ]
  states = [(_take(it, 3), it.get_state())[1] for it in its]
  assert all(state == states[0] for state in states)
  expected = _take(train_iterator(data, BYTES, sources, 4), 6)[3:]
  halves = [
    train_iterator(data, BYTES, sources, 4, process_index=p, process_count=2) for p in range(2)
  ]
  for half in halves:
    half.set_state(states[0])
  joined = [
    {k: np.concatenate([x[k], y[k]]) for k in x}
    for x, y in zip(*(_take(h, 3) for h in halves), strict=True)
  ]
  assert _equal(joined, expected)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_threads_do_not_change_the_order(setup, pipeline, threads):
  # Catches batches or rows that are in the order in which threads finish.
  data, sources = setup
  data.pipeline = pipeline
  expected = _take(train_iterator(data, BYTES, sources, 4), 20)
  data.threads = threads
  it = train_iterator(data, BYTES, sources, 4)
  assert _equal(_take(it, 20), expected)
  it.close()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_seed_changes_the_order(setup, pipeline):
  # Catches a data.seed that is ignored.
  data, sources = setup
  data.pipeline = pipeline
  first = _take(train_iterator(data, BYTES, sources, 4), 3)
  data.seed = 1
  assert not _equal(first, _take(train_iterator(data, BYTES, sources, 4), 3))


def test_errors(setup):
  # Catches errors of Grain or NumPy, which do not name the field.
  data, sources = setup
  with pytest.raises(ConfigError, match="train.batch_size=6"):
    train_iterator(data, BYTES, sources, 6, process_index=0, process_count=4)
  with pytest.raises(ConfigError, match="data.seq_len=0"):
    train_iterator(data, BYTES, sources, 4, 0)
  for data.weights in ((1,), (1, -1)):
    with pytest.raises(ConfigError, match="data.weights"):
      train_iterator(data, BYTES, sources, 4)
  data.threads = -1
  with pytest.raises(ConfigError, match="data.threads=-1"):
    train_iterator(data, BYTES, sources, 4)
  data.threads, data.pipeline = 0, "windos"
  with pytest.raises(ConfigError, match="data.pipeline='windos': did you mean 'windows'"):
    train_iterator(data, BYTES, sources, 4)
  data.threads, data.pipeline = 10**9, "windows"
  with pytest.raises(ConfigError, match="data.threads=1000000000: must be from 0 .* to 1024"):
    train_iterator(data, BYTES, sources, 4)
