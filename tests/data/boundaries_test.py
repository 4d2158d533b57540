"""Tests which tokens mark the start and the end of documents."""

import mutations
import pytest

from moe_jax.data import make_tokenizer
from moe_jax.data.boundaries import KNOWN
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
DEEPSEEK = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"


@pytest.mark.parametrize("name", [*KNOWN, DEEPSEEK])
def test_known_boundaries(write_tokenizer, capfd, name):
  # Catches a boundary of a published model that is not in the list, so that an untrained id is
  # added, and a name that is spelt with other bars or another underscore than the published one.
  tokenizer = make_tokenizer(write_tokenizer("BPE", "<|pad|>", name))
  assert tokenizer.size == max(tokenizer.boundary + 1, len(mutations.MODELS["BPE"]["vocab"]) + 1)
  assert (
    tokenizer._model.id_to_token(tokenizer.boundary) == name
    and "new id" not in capfd.readouterr().err
  )


def test_a_new_boundary_is_told(write_tokenizer, capfd):
  # Catches a new id, for which no weights are trained, that is added without a note.
  tokenizer = make_tokenizer(write_tokenizer("BPE", "<|new|>"))
  assert tokenizer.boundary == len(mutations.MODELS["BPE"]["vocab"]) + 1
  notes = [line for line in capfd.readouterr().err.splitlines() if "new id" in line]
  assert (
    len(notes) == 1
    and f"id {tokenizer.boundary}" in notes[0]
    and "--config.data.bos=NAME" in notes[0]
  )
  assert "'<|new|>'" in notes[0]


def test_named_boundaries(write_tokenizer, sentencepiece_file, capfd):
  # Catches names that are ignored, an end token that stands for bytes, and different mappings with
  # the same fingerprint.
  spec = write_tokenizer("BPE", "<s>", "</s>", "<|new|>")
  plain, new, both = (
    make_tokenizer(spec),
    make_tokenizer(spec, "<|new|>"),
    make_tokenizer(spec, "<|new|>", "</s>"),
  )
  last = len(mutations.MODELS["BPE"]["vocab"])
  assert (plain.boundary, plain.eos) == (1, None) and (new.boundary, new.eos) == (last, None)
  assert (both.boundary, both.eos) == (last, 2) and both.byte_lengths[[1, 2, last]].sum() == 0
  assert both.document(b"the").tolist() == [last, *plain.encode(b"the"), 2]
  assert len({t.fingerprint for t in (plain, new, both, make_tokenizer(spec, "", "</s>"))}) == 4
  assert make_tokenizer(spec, "<s>").fingerprint == plain.fingerprint
  assert "new id" not in capfd.readouterr().err
  model = make_tokenizer(f"sentencepiece:{sentencepiece_file}", "</s>", "<s>")
  assert (model.boundary, model.eos) == (2, 1)


def test_a_named_token_is_special_whatever_the_file_says(write_tokenizer):
  # Catches a text that is encoded with a boundary in it because it spells out an added token that
  # is not declared special.
  token = {
    "id": 999,
    "content": "<|doc|>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
  }
  tokenizer = make_tokenizer(write_tokenizer("BPE", added_tokens=[token]), "<|doc|>")
  assert tokenizer.boundary not in tokenizer.encode(b"the <|doc|>")


@pytest.mark.parametrize(
  "bos, eos, said",
  [
    ("<S>", "", "data.bos='<S>': did you mean '<s>'.* its special tokens are: '<s>', '</s>'"),
    ("", "</S>", "data.eos='</S>': did you mean '</s>'"),
    ("zzz", "", "has no such token"),
    ("the", "", "data.bos='the': is a token of ordinary text"),
    ("<unk>", "", "data.bos='<unk>': is a token of ord"),
    ("", "<s>", "data.eos='<s>': is the token that starts every document"),
    ("</s>", "</s>", "data.eos='</s>': is the token that starts every document"),
  ],
)
def test_names_that_cannot_be_boundaries(write_tokenizer, bos, eos, said):
  # Catches a KeyError, a boundary that text can contain, and two boundaries between documents.
  with pytest.raises(ConfigError, match=said):
    make_tokenizer(write_tokenizer("BPE", "<s>", "</s>"), bos, eos)


def test_the_byte_tokenizer_has_no_names():
  # Catches a data.bos or data.eos that is ignored.
  with pytest.raises(
    ConfigError, match="data.bos='<s>': the tokenizer 'bytes' has no tokens with names"
  ):
    make_tokenizer("bytes", "<s>")
  with pytest.raises(
    ConfigError, match="data.eos='</s>': the tokenizer 'bytes' has no tokens with names"
  ):
    make_tokenizer("bytes", "", "</s>")
