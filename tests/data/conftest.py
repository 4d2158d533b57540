"""Fixtures: a data config, files of text and tokenizers, and one embedded corpus per session."""

import io
import pathlib
import sys

import pytest

from moe_jax.data.options import DataOptions

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import mutations


class EditableOptions(DataOptions):
  """Options of the data that a test may assign to."""

  def __setattr__(self, name, value):
    assert hasattr(self, name), f"there is no option {name}"
    object.__setattr__(self, name, value)


@pytest.fixture
def data(tmp_path):
  """Returns options of the data that can be assigned to, with a cache of this test alone."""
  return EditableOptions(
    seq_len=16,
    validation_fraction=0.25,
    threads=0,
    cache_dir=str(tmp_path / "cache"),
    tfds_dir=str(tmp_path / "tfds"),
    encoder_len=24,
  )


@pytest.fixture
def words(tmp_path):
  """Returns a function that writes documents of distinct words.

  `words("name", 12)` writes twelve files and returns the name of a text source that reads them.
  """

  def write(name: str, documents: int, size: int = 40) -> str:
    folder = tmp_path / name
    folder.mkdir()
    for i in range(documents):
      text = "".join(f"{name}{i}.{j} " for j in range(size))[: size + 3 * i]
      (folder / f"{i:03d}.txt").write_text(text)
    return f"text:{folder}"

  return write


@pytest.fixture(scope="session")
def corpus_cache(tmp_path_factory):
  """Returns a cache folder that holds the embedded corpus, which is built once."""
  folder = tmp_path_factory.mktemp("corpus")
  from moe_jax.data import embedded

  embedded._load(folder)
  return str(folder)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory):
  """Returns a model that is trained to be lossless as the docstring of SentencePiece describes."""
  import sentencepiece

  path, model = tmp_path_factory.mktemp("sp") / "m.model", io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(mutations.WORDS.splitlines(True)),
    model_writer=model,
    model_type="bpe",
    vocab_size=350,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    byte_fallback=True,
    allow_whitespace_only_pieces=True,
    user_defined_symbols=["\n"],
    minloglevel=2,
  )
  path.write_bytes(model.getvalue())
  return path


def _train(tokenizer, special):
  from tokenizers import pre_tokenizers, trainers

  trainer = trainers.BpeTrainer(
    vocab_size=350,
    special_tokens=special,
    show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator(mutations.WORDS.splitlines(True), trainer)


@pytest.fixture(scope="session")
def hf_file(tmp_path_factory):
  """Returns a byte-level BPE file with a post-processor, truncation and padding.

  All of these could change a text, and must be ignored.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, processors

  path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  _train(tokenizer, ["<|endoftext|>"])
  end = tokenizer.token_to_id("<|endoftext|>")
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
  )
  tokenizer.enable_truncation(5)
  tokenizer.enable_padding(length=400)
  tokenizer.save(str(path))
  return path


@pytest.fixture
def write_tokenizer(tmp_path):
  """Returns a function that writes `mutations.spec(...)`, or any JSON, as a tokenizer.json.

  The function returns the value of `data.tokenizer` for this file.
  """

  def write(model, *special, **changes):
    whole = mutations.spec(model, special, **changes) if str(model) in mutations.MODELS else model
    (tmp_path / "t.json").write_text(mutations.dump(whole))
    return f"hf:{tmp_path}/t.json"

  return write
