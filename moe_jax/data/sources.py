"""Sources of text: `embedded:DOMAIN`, `text:GLOB`, `jsonl:GLOB` and `tfds:NAME[:VERSION]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from moe_jax.data.documents import Subset
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError, choose


@dataclasses.dataclass(frozen=True)
class Source:
  """A named text in two disjoint parts, one for training and one for validation.

  Attributes:
    name: The name as it is written in `data.sources`.
    fingerprint: SHA-256 of the text in hexadecimal. It does not depend on where the text is stored.
    splits: The parts "train" and "validation".
  """

  name: str
  fingerprint: str
  splits: Mapping[str, Subset]

  @property
  def order(self) -> str:
    """What the order of the source's records depends on, beside the seed.

    It is the fingerprint of files, so that a corpus at another path is read in the same order, and
    the name of everything else.
    """
    return self.fingerprint if self.name.startswith(("text:", "jsonl:")) else self.name

  def documents(self, split: str) -> Subset:
    """Returns the documents of "train" or "validation" as a random-access sequence of bytes."""
    return self.splits[split]


# Each kind of source imports its module only when it is used.
def _embedded(name, data: DataOptions):
  from moe_jax.data.embedded import embedded

  return embedded(name, data)


def _text(name, data: DataOptions):
  from moe_jax.data.files import text

  return text(name, data)


def _jsonl(name, data: DataOptions):
  from moe_jax.data.files import jsonl

  return jsonl(name, data)


def _tfds(name, data: DataOptions):
  from moe_jax.data.tfds import tfds

  return tfds(name, data)


SOURCES = {"embedded": _embedded, "text": _text, "jsonl": _jsonl, "tfds": _tfds}


def make_sources(data: DataOptions) -> list[Source]:
  """Returns the sources that `data.sources` names, in that order.

  Raises:
    ConfigError: If there is no source, if one is named twice, if a kind or domain is unknown, if
      files are missing or empty, or if a dataset is not prepared.
  """
  names = list(data.sources)
  if not names:
    raise ConfigError("data.sources", (), "name at least one source, e.g. embedded:prose")
  sources = []
  for name in names:
    if names.count(name) > 1:
      raise ConfigError(
        "data.sources", name, "is named twice; name it once and raise its share in data.weights"
      )
    kind, _, rest = name.partition(":")
    open_source = choose("data.sources", kind, SOURCES, shown=name)
    if not rest:
      raise ConfigError(
        "data.sources", name, f"names nothing; write {kind}:... (see configs/base.py)"
      )
    fingerprint, splits = open_source(name, data)
    sources.append(Source(name, fingerprint, splits))
  return sources


def fingerprints(sources: Sequence[Source]) -> dict[str, str]:
  """Returns the SHA-256 of each source's text by the name of the source."""
  return {source.name: source.fingerprint for source in sources}
