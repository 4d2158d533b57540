"""Where text comes from: `embedded:DOMAIN`, `text:GLOB`, `jsonl:GLOB`, `tfds:NAME[:VERSION]`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from moe_jax.data.documents import Subset
from moe_jax.errors import ConfigError, choose


@dataclasses.dataclass(frozen=True)
class Source:
  """Named text in two disjoint parts.

  Attributes:
    name: as written in `data.sources`.
    fingerprint: sha256 (hex) of the text; the same wherever it lies.
    splits: "train" and "validation".
  """

  name: str
  fingerprint: str
  splits: Mapping[str, Subset]

  def documents(self, split: str) -> Subset:
    """A random-access sequence of bytes: `len`, `[i]`, iteration; `.key(i)` names a document."""
    return self.splits[split]


def _embedded(name, data):
  from moe_jax.data.embedded import embedded  # each kind imports what it needs when it is used

  return embedded(name, data)


def _text(name, data):
  from moe_jax.data.files import text

  return text(name, data)


def _jsonl(name, data):
  from moe_jax.data.files import jsonl

  return jsonl(name, data)


def _tfds(name, data):
  from moe_jax.data.tfds import tfds

  return tfds(name, data)


SOURCES = {"embedded": _embedded, "text": _text, "jsonl": _jsonl, "tfds": _tfds}


def make_sources(data) -> list[Source]:
  """The sources that `data.sources` names, in that order.

  Raises:
    ConfigError: no source, one twice, an unknown kind or domain, missing or empty files, a dataset
      not prepared.
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
  """Name -> sha256 of its text."""
  return {source.name: source.fingerprint for source in sources}
