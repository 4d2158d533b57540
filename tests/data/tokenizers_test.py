import io
import json

import numpy as np
import pytest
from mutations import WORDS

from moe_jax.data import make_tokenizer
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit

TEXT = (
  "  two  spaces,\n\ttab \u00e9\u00df \u4e16\u754c \U0001f600 <s> <|endoftext|> and </s> done\n"
)


@pytest.fixture(params=["bytes", "sentencepiece", "hf"])
def tokenizer(request):
  kinds = {"bytes": "bytes", "sentencepiece": "sentencepiece:{}", "hf": "hf:{}"}
  file = None if request.param == "bytes" else request.getfixturevalue(f"{request.param}_file")
  return make_tokenizer(kinds[request.param].format(file))


@pytest.mark.parametrize("text", [TEXT, WORDS, "", " ", "\n", "a"])
def test_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
  # Catches wrong lengths of byte pieces, spaces or multi-byte characters, and a space that is put
  # in front. Also catches special tokens that are read as such (0 bytes) if a text spells them out,
  # and the truncation, padding and post-processing of the file.
  ids = tokenizer.encode(text.encode())
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert tokenizer.decode(ids) == text.encode()
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
  assert tokenizer.boundary not in ids and (ids >= 0).all() and (ids < tokenizer.size).all()


def test_shape_of_a_tokenizer(tokenizer):
  # Catches a boundary that is not an id or stands for bytes, and lengths that do not cover all ids.
  assert tokenizer.byte_lengths.shape == (tokenizer.size,)
  assert (
    0 <= tokenizer.boundary < tokenizer.size and tokenizer.byte_lengths[tokenizer.boundary] == 0
  )
  assert tokenizer.fingerprint


def test_any_bytes_and_any_ids(tokenizer):
  # Catches a UnicodeDecodeError for bytes that are not text, or for ids that a model samples.
  ids = tokenizer.encode(bytes(range(256)))
  assert tokenizer.byte_lengths[ids].sum() == len(tokenizer.decode(ids))
  assert tokenizer.decode(np.arange(tokenizer.size))
  assert tokenizer.decode([tokenizer.boundary]) == b""
  assert tokenizer.decode([]) == b""


def test_bytes_tokenizer():
  # Catches ids that are offset, a boundary that is one of the bytes, and a size that cannot be
  # divided by eight devices.
  tokenizer = make_tokenizer("bytes")
  assert tokenizer.encode(b"\x00a\xff").tolist() == [0, 97, 255]
  assert (tokenizer.boundary, tokenizer.size) == (256, 264)
  assert tokenizer.decode([97, 256, 263, 98]) == b"ab"
  assert tokenizer.byte_lengths.sum() == 256


def test_subwords_are_subwords(sentencepiece_file, hf_file):
  # Catches a tokenizer that falls back to bytes for all text.
  for spec in (f"sentencepiece:{sentencepiece_file}", f"hf:{hf_file}"):
    assert len(make_tokenizer(spec).encode(WORDS.encode())) < len(WORDS) / 2


def test_boundary_is_the_models_own_where_it_has_one(sentencepiece_file, hf_file, tmp_path):
  # Catches an id that is added although the model has a boundary, and a boundary that is the id of
  # another piece.
  import tokenizers

  assert make_tokenizer(f"sentencepiece:{sentencepiece_file}").boundary == 1  # <s>
  own = make_tokenizer(f"hf:{hf_file}")
  assert own.boundary == tokenizers.Tokenizer.from_file(str(hf_file)).token_to_id("<|endoftext|>")
  spec = json.loads(hf_file.read_text())
  spec["added_tokens"] = []
  (tmp_path / "t.json").write_text(json.dumps(spec))
  appended = make_tokenizer(f"hf:{tmp_path}/t.json")
  assert (
    appended.boundary == own.size and appended.size % 8 == 0 and appended.size > appended.boundary
  )


def test_fingerprints_differ(sentencepiece_file, hf_file, tmp_path):
  # Catches equal fingerprints, with which the tokens of one tokenizer would be read from the cache
  # of another.
  (tmp_path / "t.json").write_text(hf_file.read_text().replace("<|endoftext|>", "<s>"))
  specs = ("bytes", f"sentencepiece:{sentencepiece_file}", f"hf:{hf_file}", f"hf:{tmp_path}/t.json")
  assert len({make_tokenizer(spec).fingerprint for spec in specs}) == 4


def test_a_lossy_model_is_told(tmp_path, capfd):
  # Catches bits per byte that are those of another text than the one on disk, without a note.
  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(WORDS.splitlines()), model_writer=model, vocab_size=60, minloglevel=2
  )
  (tmp_path / "m.model").write_bytes(model.getvalue())
  make_tokenizer(f"sentencepiece:{tmp_path}/m.model")
  assert "changes text" in capfd.readouterr().err


@pytest.mark.parametrize(
  "content, spec, remedy",
  [
    (None, "byte", "did you mean 'bytes'"),
    (None, "sentencepeice:x", "did you mean 'sentencepiece'"),
    (None, "bytes:x", "takes no file"),
    (None, "hf", "names no file"),
    (None, "sentencepiece:", "names no file"),
    (None, "hf:{}", "there is no such file .*--config.data.tokenizer=bytes needs none"),
    (None, "sentencepiece:{}", "there is no such file"),
    (b"", "sentencepiece:{}", "the file is empty"),
    (b"Plain text, of no use.\n" * 9, "sentencepiece:{}", "is not a SentencePiece model"),
    (bytes(range(256)), "sentencepiece:{}", "is not a SentencePiece model"),
    (b'{"model": {}}', "sentencepiece:{}", "is a JSON file; write hf:"),
    (b"Plain text", "hf:{}", "is not JSON; a SentencePiece model is sentencepiece:"),
    (b"\xff\xfe\x00", "hf:{}", "is not JSON"),
    (b'{"vocab_size": 5}', "hf:{}", "no tokenizer.json"),
    (b'["model"]', "hf:{}", "no tokenizer.json"),
    (b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', "hf:{}", "cannot be counted"),
    (
      b'{"model": {"type": "Nonsense"}, "decoder": {"type": "ByteLevel"}}',
      "hf:{}",
      "not a tokenizer.json that this",
    ),
  ],
)
def test_errors(tmp_path, content, spec, remedy):
  # Catches errors of the libraries (RuntimeError, bare Exception), which do not name the field or
  # the remedy.
  path = tmp_path / "file"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ConfigError, match=f"^data.tokenizer=.*{remedy}"):
    make_tokenizer(spec.format(path))


def test_a_model_given_to_the_other_kind(sentencepiece_file, hf_file, tmp_path):
  # Catches errors that do not say which kind of tokenizer the file is.
  with pytest.raises(ConfigError, match="a SentencePiece model is sentencepiece:"):
    make_tokenizer(f"hf:{sentencepiece_file}")
  with pytest.raises(ConfigError, match="write hf:"):
    make_tokenizer(f"sentencepiece:{hf_file}")
  with pytest.raises(ConfigError, match="is a folder"):
    make_tokenizer(f"hf:{tmp_path}")
