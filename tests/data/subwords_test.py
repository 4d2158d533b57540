"""Tests what the tokens of tokenizer files stand for, and how invalid files are refused."""

import mutations
import numpy as np
import pytest

from moe_jax.data import make_tokenizer
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("model", mutations.MODELS)
def test_an_unknown_token_stands_for_no_byte(write_tokenizer, model):
  # Catches an unknown token that is not declared special and is counted as the bytes of its name.
  tokenizer = make_tokenizer(write_tokenizer(model))
  known, unknown = tokenizer.encode(b"the"), tokenizer.encode("\u4e16".encode())
  assert tokenizer.byte_lengths[unknown].sum() == 0 and 0 in unknown
  # The word models put a space in front.
  assert tokenizer.byte_lengths[known].sum() == (4 if model.startswith("Word") else 3)
  declared = make_tokenizer(
    write_tokenizer(
      model,
      added_tokens=[
        {
          "id": 0,
          "content": "<unk>",
          "single_word": False,
          "lstrip": False,
          "rstrip": False,
          "normalized": False,
          "special": False,
        }
      ],
    )
  )
  assert declared.byte_lengths[0] == 0


def test_marks_of_word_pieces_stand_for_no_byte(write_tokenizer):
  # Catches "##the" that is counted as five bytes.
  tokenizer = make_tokenizer(write_tokenizer("WordPiece"))
  ids = tokenizer.encode(b"thethe")
  assert ids.tolist() == [2, 3] and tokenizer.byte_lengths[ids].tolist() == [4, 3]


@pytest.mark.parametrize("model", mutations.MODELS)
def test_special_tokens_in_a_text_are_text_in_every_model(write_tokenizer, model):
  # Catches a boundary in the middle of a document, and bytes that are not counted, if the special
  # token is in the model's own vocabulary. Unigram uses any entry that occurs in a text.
  tokenizer = make_tokenizer(write_tokenizer(model, "<s>"))
  assert tokenizer.boundary == 1
  for text in (b"<s>", b"the <s>the<s><s>", b" <s>"):
    ids = tokenizer.encode(text)
    assert tokenizer.boundary not in ids
    if not model.startswith("Word"):
      assert tokenizer.byte_lengths[ids].sum() == len(text) and tokenizer.decode(ids) == text


def _vocabulary(entries, **changes):
  return mutations.spec(
    "BPE", model=mutations.MODELS["BPE"] | {"vocab": entries, "merges": []} | changes
  )


@pytest.mark.parametrize(
  "spec, said",
  [
    (
      _vocabulary({"a": 0, "<unk>": 2**31 + 5}),
      "the token '<unk>' the id 2147483653, but it has only 2 tokens",
    ),
    (_vocabulary({"a": 0, "b": 2**20}), "the token 'b' the id 1048576, but it has only 2 tokens"),
    (_vocabulary({"a": 2**32}), "not a tokenizer.json that this version reads"),
    (_vocabulary({"a": -1}), "not a tokenizer.json that this version reads"),
    (_vocabulary({"a": 0.5}), "not a tokenizer.json that this version reads"),
    (_vocabulary({"a": float("nan")}), "not a tokenizer.json that this version reads"),
    (_vocabulary({}), "its vocabulary is empty"),
    (_vocabulary({"a": 0, "b": 1, "c": 1}), "gives the tokens '[bc]' and '[bc]' the same id 1"),
    (
      mutations.spec("Unigram", model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}),
      "cannot encode a te",
    ),
    (
      mutations.spec("WordLevel", model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}),
      "cannot encode a",
    ),
    (
      mutations.spec("BPE", added_tokens=[{"content": "<s>"}]),
      "not a tokenizer.json that this version reads",
    ),
    (mutations.spec("BPE", added_tokens=[5]), "not a tokenizer.json that this version reads"),
    (mutations.spec("BPE", normalizer=mutations.DEEP), "nested too deeply"),
    (mutations.DEEP, "nested too deeply"),
    ({"model": mutations.DEEP}, "nested too deeply"),
    (mutations.spec("BPE", version="\ud800"), "not a tokenizer.json that this version reads"),
  ],
)
def test_vocabularies_that_no_embedding_can_have(write_tokenizer, spec, said):
  # Catches a MemoryError for a very high id, an id that overflows int32, a RecursionError, a
  # ValueError of max() without arguments, and all exceptions of the library.
  with pytest.raises(ConfigError, match=f"^data.tokenizer='hf:.*t.json': .*{said}"):
    make_tokenizer(write_tokenizer(spec))


def test_a_vocabulary_with_holes(write_tokenizer):
  # Catches an IndexError for unused ids, which pruned vocabularies have.
  tokenizer = make_tokenizer(
    write_tokenizer(_vocabulary({"<unk>": 0, "a": 5, "\u2581": 900, "<s>": 1000}))
  )
  assert (
    tokenizer.boundary == 1001
    and tokenizer.size == 1008
    and tokenizer.byte_lengths.sum() == 1 + 1 + 3
  )
  assert tokenizer.decode(np.arange(tokenizer.size)) == b"a <s>"


def test_the_trace_of_a_binding_is_not_shown(tmp_path, write_tokenizer, capfd):
  # Catches the trace that a Rust panic writes to standard error in addition to the message, and a
  # standard error that is closed after it. The library panics here because the merges do not fit
  # the prefix.
  with pytest.raises(ConfigError):
    make_tokenizer(
      write_tokenizer(
        mutations.spec("BPE", model=mutations.MODELS["BPE"] | {"continuing_subword_prefix": "##"})
      )
    )
  assert not capfd.readouterr().err
  make_tokenizer(write_tokenizer("BPE"))
  assert "new id" in capfd.readouterr().err


def test_a_damaged_sentencepiece_model(sentencepiece_file, tmp_path):
  # Catches a UnicodeDecodeError for a piece whose bytes were changed.
  content = sentencepiece_file.read_bytes()
  (tmp_path / "m.model").write_bytes(content.replace(b"quick", b"qu\xffck"))
  with pytest.raises(
    ConfigError, match="^data.tokenizer='sentencepiece:.*': is a damaged SentencePiece model"
  ):
    make_tokenizer(f"sentencepiece:{tmp_path}/m.model")


@pytest.mark.parametrize("path", ["~nobody_of_this_name/x", "x" * 5000, "a\0b"])
@pytest.mark.parametrize("kind", ["hf", "sentencepiece"])
def test_paths_that_no_file_can_have(kind, path):
  # Catches OSError, RuntimeError and ValueError of the path library.
  with pytest.raises(ConfigError, match=f"^data.tokenizer='{kind}:"):
    make_tokenizer(f"{kind}:{path}")
