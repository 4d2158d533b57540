import pathlib

import numpy as np
import pytest

from moe_jax.data import batches_of, make_sources, make_tokenizer, stream, train_iterator
from moe_jax.data.stream import Row
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
BYTES = make_tokenizer("bytes")
TEXTS = [b"abc", b"", b"defghij", b"", b"", b"k", b"lmnopqrstuvwxyz" * 3, b"!"]


class Endless:
  def __getitem__(self, i):
    return TEXTS[i % len(TEXTS)]


@pytest.mark.parametrize("seq_len", [1, 4, 50])
def test_a_row_is_its_documents_end_to_end(seq_len):
  # Catches tokens that are lost or repeated at the end of a window, at empty documents, or in
  # documents that are longer than a window.
  row = Row(Endless(), BYTES, first=1, stride=3, position=(0, 0))
  expected = [t for i in range(60) for t in (BYTES.boundary, *Endless()[1 + 3 * i])]
  for n in range(200 // seq_len):
    assert row.window(seq_len).tolist() == expected[n * seq_len : (n + 1) * seq_len + 1]


@pytest.mark.parametrize("seq_len", [1, 4, 50])
def test_a_row_starts_anywhere(seq_len):
  # Catches a position that is off by a token or a document after some number of windows.
  row = Row(Endless(), BYTES, 0, 1, (0, 0))
  for _ in range(120 // seq_len):
    restarted = Row(Endless(), BYTES, 0, 1, row.position)
    assert row.window(seq_len).tolist() == restarted.window(seq_len).tolist()
    assert row.position == restarted.position


def _iterator(data, sources, batch_size=4, **kwargs):
  data.pipeline = "stream"
  return train_iterator(data, BYTES, sources, batch_size, **kwargs)


def _sources(data, words):
  data.sources = (words("a", 12), words("b", 25))
  return make_sources(data)


def test_an_epoch_reads_every_document_once(data, words):
  # Catches rows that read the same documents, and validation documents that are trained on.
  sources = _sources(data, words)
  it, text = _iterator(data, sources, batch_size=2), ["", ""]
  for _ in range(400):
    for row, inputs in enumerate(next(it)["inputs"]):
      text[row] += "".join("|" if t == BYTES.boundary else chr(t) for t in inputs)
  documents = {t.decode() for source in sources for t in source.documents("train")}
  read = [d for row in text for d in row.split("|")[1:-1]]
  assert set(read) == documents
  assert max(map(read.count, documents)) - min(map(read.count, documents)) <= 3


def test_state_on_several_processes_is_gathered(data, words, monkeypatch):
  # Catches a checkpoint that contains only the rows of the first process.
  sources = _sources(data, words)
  its = [_iterator(data, sources, process_index=p, process_count=2) for p in range(2)]
  for it in its:
    next(it)
  tables = []
  monkeypatch.setattr(
    stream, "gather", lambda table: tables.append(table) or np.concatenate(tables)
  )
  its[0].get_state()
  state = its[1].get_state()
  assert sorted(state["rows"]) == ["0", "1", "2", "3"]
  rest = _iterator(data, sources)
  rest.set_state(state)
  assert np.array_equal(next(rest)["inputs"], np.concatenate([next(it)["inputs"] for it in its]))


def test_gather_keeps_64_bits(monkeypatch):
  # Catches positions that process_allgather truncates to the default 32-bit integers of JAX.
  import jax
  from jax.experimental import multihost_utils

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    multihost_utils, "process_allgather", lambda x: np.asarray(jax.numpy.stack([x, x]))
  )
  table = np.array([[1, 2**40 + 3, -1], [4, 5, 6]])
  assert stream.gather(table).tolist() == table.tolist() * 2


def test_another_batch_size_or_pipeline_is_refused(data, words):
  # Catches rows that continue the documents of other rows after a change of the batch size.
  sources = _sources(data, words)
  state = _iterator(data, sources).get_state()
  with pytest.raises(ConfigError, match="train.batch_size=6: .* batches of 4"):
    _iterator(data, sources, batch_size=6).set_state(state)
  with pytest.raises(ConfigError, match="data.pipeline='stream': .* 'windows'"):
    _iterator(data, sources).set_state({"pipeline": "windows", "batches": 3})
  data.pipeline = "windows"
  with pytest.raises(ConfigError, match="data.pipeline='windows': .* 'stream'"):
    train_iterator(data, BYTES, sources, 4).set_state(state)


def test_batches_are_counted(data, words):
  # Catches a state without the number of batches, and one that counts the batches that were only
  # prefetched.
  sources, data.threads = _sources(data, words), 2
  it = _iterator(data, sources)
  assert it.get_state()["batches"] == 0
  for _ in range(3):
    next(it)
  state = it.get_state()
  assert state["batches"] == batches_of(state) == 3
  old = {name: value for name, value in state.items() if name != "batches"}
  it.set_state(old)
  next(it)
  assert "batches" not in it.get_state()
  it.close()


@pytest.mark.parametrize("documents", [1, 2, 4, 15])
def test_more_rows_than_documents_are_refused(data, words, documents):
  # Catches rows that read the same text side by side, so that a batch contains it several times.
  data.sources, data.validation_fraction = (words("a", documents + 1),), 1e-9
  sources = make_sources(data)
  assert len(sources[0].documents("train")) == documents
  with pytest.raises(
    ConfigError,
    match=f"data.sources=.* has {documents} training documents for 16 of the 16 rows.*"
    "--config.data.pipeline=windows",
  ):
    _iterator(data, sources, batch_size=16)
  rows = next(_iterator(data, sources, batch_size=documents))["inputs"]
  assert len(np.unique(rows, axis=0)) == documents


def test_rows_are_counted_for_each_source(data, words):
  # Catches a count over all sources, which does not notice that rows share the few documents of a
  # source with a large weight. Also catches a source of weight 0 that is refused, and natural
  # shares that are refused because of rounding errors.
  data.sources, data.validation_fraction = (words("a", 4), words("b", 40)), 1e-9
  sources = make_sources(data)
  data.weights = (0.5, 0.5)
  with pytest.raises(
    ConfigError, match="data.sources='text:.*a': has 3 training documents for 8 of the 16 rows"
  ):
    _iterator(data, sources, batch_size=16)
  for data.weights, batch_size in (((), 42), ((0, 1), 16), ((0.1, 0.9), 16)):
    rows = next(_iterator(data, sources, batch_size=batch_size))["inputs"]
    assert len(np.unique(rows, axis=0)) == batch_size


def test_each_row_meets_every_document_where_their_number_divides_the_batch(data, words):
  # Catches epochs that all have the same order, so that row r of 4 would only ever read documents r
  # and r + 4 of 8.
  data.sources, data.validation_fraction = (words("a", 9),), 1e-9
  sources = make_sources(data)
  dataset = _iterator(data, sources)._dataset
  for row in range(4):
    assert len({dataset[row + 4 * n] for n in range(60)}) == 8


def test_a_position_that_its_document_lacks(data, words):
  # Catches a row that starts after the end of its document and continues to count from there.
  sources = _sources(data, words)
  it = _iterator(data, sources)
  state = it.get_state()
  it.set_state(state | {"rows": state["rows"] | {"2": [0, 10_000]}})
  with pytest.raises(
    ConfigError, match="^checkpoint='data position': row 2 .* token 10000 of a document of"
  ):
    next(it)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
  "damage, said",
  [
    (lambda path: path.unlink(), "is no longer there"),
    (lambda path: path.write_text("x" * 9), "has changed since"),
    (lambda path: path.write_bytes(path.read_bytes()[::-1]), "has changed since"),
  ],
)
def test_a_file_that_changes_while_it_is_read(data, words, threads, damage, said):
  # Catches an OSError if a file is removed during a run, and training on a text that does not match
  # the fingerprint if it changes.
  sources, data.threads = _sources(data, words), threads
  it = _iterator(data, sources)
  next(it)
  for name in data.sources:
    for path in pathlib.Path(name.partition(":")[2]).iterdir():
      damage(path)
  with pytest.raises(ConfigError, match=rf"^data.sources='text:.*\.txt {said}"):
    for _ in range(50):
      next(it)
  it.close()


def test_spans_depend_on_the_position_in_a_row(data, words):
  # Catches a key that does not contain the position, so that all windows of a row are masked at the
  # same places.
  sources = _sources(data, words)
  data.objective, data.noise_density, data.mean_span = "span_corruption", 0.3, 2.0
  it = _iterator(data, sources, batch_size=1)
  places = {tuple(np.flatnonzero(next(it)["encoder_tokens"][0] >= BYTES.size)) for _ in range(8)}
  assert len(places) > 4
