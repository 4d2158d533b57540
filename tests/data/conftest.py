"""A data config, and one embedded corpus for all tests of the session."""

import pytest
from ml_collections import config_dict


@pytest.fixture
def data(tmp_path):
  """`config.data`, unlocked, with a cache of its own."""
  return config_dict.ConfigDict(dict(
      sources=("embedded:prose", "embedded:code", "embedded:tables"), weights=(), pipeline="windows",
      tokenizer="bytes", seq_len=16, validation_fraction=0.25, seed=0, threads=0, cache_dir=str(tmp_path / "cache"),
      tfds_dir=str(tmp_path / "tfds"), text_field="text", validation_split="", objective="next_token",
      encoder_len=24, noise_density=0.15, mean_span=3.0))


@pytest.fixture
def words(tmp_path):
  """Writes documents of distinct words: `words("name", 12)` -> the spec of a text source of twelve files."""

  def write(name: str, documents: int, size: int = 40) -> str:
    folder = tmp_path / name
    folder.mkdir()
    for i in range(documents):
      text = "".join(f"{name}{i}.{j} " for j in range(size))[:size + 3 * i]
      (folder / f"{i:03d}.txt").write_text(text)
    return f"text:{folder}"

  return write


@pytest.fixture(scope="session")
def corpus_cache(tmp_path_factory):
  """A cache folder that holds the embedded corpus, built once."""
  folder = tmp_path_factory.mktemp("corpus")
  from moe_jax.data import embedded
  embedded._load(folder)
  return str(folder)
