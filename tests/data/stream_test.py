import numpy as np
import pytest

from moe_jax.data import make_sources, make_tokenizer, stream, train_iterator
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
  # Catches: tokens lost or doubled where a window ends, at empty documents, or in documents longer than a window.
  row = Row(Endless(), BYTES, first=1, stride=3, position=(0, 0))
  expected = [t for i in range(60) for t in (BYTES.boundary, *Endless()[1 + 3 * i])]
  for n in range(200 // seq_len):
    assert row.window(seq_len).tolist() == expected[n * seq_len:(n + 1) * seq_len + 1]


@pytest.mark.parametrize("seq_len", [1, 4, 50])
def test_a_row_starts_anywhere(seq_len):
  # Catches: a position that is off by a token or a document after any number of windows.
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
  # Catches: rows that read the same documents; validation documents in training.
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
  # Catches: a checkpoint with the first process's rows only; 64-bit positions cut by JAX.
  sources = _sources(data, words)
  its = [_iterator(data, sources, process_index=p, process_count=2) for p in range(2)]
  for it in its:
    next(it)
  tables = []
  monkeypatch.setattr(stream, "gather", lambda table: tables.append(table) or np.concatenate(tables))
  its[0].get_state()
  state = its[1].get_state()
  assert sorted(state["rows"]) == ["0", "1", "2", "3"]
  rest = _iterator(data, sources)
  rest.set_state(state)
  assert np.array_equal(next(rest)["inputs"], np.concatenate([next(it)["inputs"] for it in its]))


def test_gather_keeps_64_bits(monkeypatch):
  # Catches: the default 32-bit integers of JAX in process_allgather.
  import jax
  from jax.experimental import multihost_utils
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.asarray(jax.numpy.stack([x, x])))
  table = np.array([[1, 2**40 + 3, -1], [4, 5, 6]])
  assert stream.gather(table).tolist() == table.tolist() * 2


def test_another_batch_size_or_pipeline_is_refused(data, words):
  # Catches: rows that continue other rows' documents after a change of the batch size.
  sources = _sources(data, words)
  state = _iterator(data, sources).get_state()
  with pytest.raises(ConfigError, match="train.batch_size=6: .* batches of 4"):
    _iterator(data, sources, batch_size=6).set_state(state)
  with pytest.raises(ConfigError, match="data.pipeline='stream': .* 'windows'"):
    _iterator(data, sources).set_state({"pipeline": "windows", "batches": 3})
  data.pipeline = "windows"
  with pytest.raises(ConfigError, match="data.pipeline='windows': .* 'stream'"):
    train_iterator(data, BYTES, sources, 4).set_state(state)
