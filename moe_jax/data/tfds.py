"""Source `tfds:NAME[:VERSION]`: a TensorFlow Datasets dataset, prepared as array_record. No
TensorFlow, no download."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from moe_jax.data.documents import Subset, split
from moe_jax.errors import ConfigError


class Examples:
  """The text field of the examples of one split; the key is the example's index."""

  def __init__(self, name: str, split_name: str, source, field: str):
    self._name, self._split, self._source, self._field = name, split_name, source, field

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> bytes:
    try:
      value = self._source[i][self._field]
    except Exception as error:  # whatever array_record and the decoders raise
      raise ConfigError(
        "data.sources",
        self._name,
        f"example {i} of its split {self._split} cannot be read ({type(error).__name__}: "
        f"{error}); its files have changed or are damaged: prepare it again",
      ) from error
    return value.encode() if isinstance(value, str) else bytes(value)

  def key(self, i: int) -> str:
    return f"{self._split}:{i}"


def tfds(name: str, data) -> tuple[str, dict[str, Subset]]:
  """`data.validation_split` names the held-out split; where it is "", examples of "train" are held
  out by their index.

  For large datasets name a split: holding out hashes every index.

  Raises:
    ConfigError: not prepared, prepared as another file format, no such split or field.
  """
  folder = _folder(name, data)
  import tensorflow_datasets  # takes a second

  try:
    builder = tensorflow_datasets.builder_from_directory(folder)
    features, splits, fingerprint = (
      builder.info.features,
      builder.info.splits,
      _fingerprint(folder, data.text_field),
    )
  except Exception as error:  # whatever it raises for JSON that is not what it wrote
    raise ConfigError(
      "data.sources",
      name,
      f"{folder} is damaged ({type(error).__name__}: {error}); prepare it again",
    ) from error
  if data.text_field not in features:
    raise ConfigError(
      "data.text_field",
      data.text_field,
      f"{name} has no such feature; it has {', '.join(sorted(features))}",
    )
  if not isinstance(features[data.text_field], tensorflow_datasets.features.Text):
    raise ConfigError("data.text_field", data.text_field, f"this feature of {name} is not text")
  wanted = ["train"] + [data.validation_split] * bool(data.validation_split)
  for split_name in wanted:
    if split_name not in splits:
      field = "data.sources" if split_name == "train" else "data.validation_split"
      raise ConfigError(
        field,
        name if split_name == "train" else split_name,
        f"{name} has no split {split_name!r}; it has {', '.join(sorted(splits))}",
      )
  try:
    parts = [Examples(name, s, builder.as_data_source(s), data.text_field) for s in wanted]
  except NotImplementedError as error:  # formats that only TensorFlow reads
    stored = builder.info.file_format.value
    raise ConfigError(
      "data.sources",
      name,
      f"is prepared as {stored} and not as array_record; convert it where "
      f"TensorFlow is installed: tfds convert_format --dataset_version_dir={folder} "
      "--out_file_format=array_record --out_dir=FOLDER",
    ) from error
  except Exception as error:  # whatever array_record raises for files that are gone or damaged
    raise ConfigError(
      "data.sources",
      name,
      f"{folder} is damaged ({type(error).__name__}: {error}); prepare it again",
    ) from error
  if data.validation_split:
    train, validation = (Subset(part, range(len(part))) for part in parts)
    return fingerprint, {"train": train, "validation": validation}
  return fingerprint, split(name, parts[0], data.validation_fraction)


def _folder(name: str, data) -> Any:
  """DATA_DIR/NAME/VERSION; the newest version that was prepared where none is named."""
  dataset, _, version = name.partition(":")[2].partition(":")
  from etils import epath  # also gs://

  root = epath.Path(
    data.tfds_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  ).expanduser()
  versions = [
    p.parent
    for p in (root / dataset).glob("*/features.json")
    if p.parent.name.replace(".", "").isdigit()
  ]
  if version:
    versions = [p for p in versions if p.name == version]
  if not versions:
    found = [
      p for pattern in ("*/*/features.json", "*/*/*/features.json") for p in root.glob(pattern)
    ]
    prepared = sorted(p.relative_to(root).parent.as_posix() for p in found)
    there = (
      f"prepared there: {', '.join(prepared[:8])}" if prepared else "nothing is prepared there"
    )
    raise ConfigError(
      "data.sources",
      name,
      f"is not prepared in {root} (data.tfds_dir; {there}); prepare it once with "
      f"tfds.builder({dataset!r}, data_dir={str(root)!r}, file_format='array_record')"
      ".download_and_prepare() in Python",
    )
  return max(versions, key=lambda p: tuple(map(int, p.name.split("."))))


def _fingerprint(folder, field: str) -> str:
  """sha256 of what identifies the text without reading it: name, version, features, each split's
  shards and bytes."""
  info = json.loads((folder / "dataset_info.json").read_text())
  known = {key: info.get(key) for key in ("name", "version", "configName", "splits")}
  text = json.dumps([field, known, (folder / "features.json").read_text()], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
