"""Source `tfds:NAME[:VERSION]`: a dataset of TensorFlow Datasets that is prepared as array_record.

Reading it needs neither TensorFlow nor a download.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from moe_jax.data.documents import Subset, split
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError


class Examples:
  """The texts of the examples of one split, as documents.

  Args:
    name: The name of the source, for messages.
    split_name: The name of the split in the dataset.
    source: The random-access data source of the split.
    field: The feature that contains the text.
  """

  def __init__(self, name: str, split_name: str, source, field: str):
    self._name, self._split, self._source, self._field = name, split_name, source, field

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> bytes:
    try:
      value = self._source[i][self._field]
    # array_record and the decoders of the features raise all kinds of exceptions.
    except Exception as error:
      raise ConfigError(
        "data.sources",
        self._name,
        f"example {i} of its split {self._split} cannot be read ({type(error).__name__}: "
        f"{error}); its files have changed or are damaged: prepare it again",
      ) from error
    return value.encode() if isinstance(value, str) else bytes(value)

  def key(self, i: int) -> str:
    """Returns the name of the split and the index of the example."""
    return f"{self._split}:{i}"


def tfds(name: str, data: DataOptions) -> tuple[str, dict[str, Subset]]:
  """Opens the source `tfds:NAME[:VERSION]`.

  The validation documents are those of the split `data.validation_split`. If that is "", examples
  of "train" are held out by a hash of their index. For large datasets a split should be named,
  because holding out computes the hash of every index.

  Args:
    name: The source as `data.sources` names it.
    data: The options of the data.

  Returns:
    The fingerprint of the text, and its splits.

  Raises:
    ConfigError: If the dataset is not prepared, is damaged or has another file format, or if it has
      no such split or field.
  """
  folder = _folder(name, data)
  # Imported here because it takes a second.
  import tensorflow_datasets

  try:
    # The library's annotations reject valid calls and allow for None where there is a value.
    builder: Any = tensorflow_datasets.builder_from_directory(folder)
    features, splits, fingerprint = (
      builder.info.features,
      builder.info.splits,
      _fingerprint(folder, data.text_field),
    )
  # The library raises all kinds of exceptions for metadata that it did not write.
  except Exception as error:
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
  split_names = ["train"] + [data.validation_split] * bool(data.validation_split)
  for split_name in split_names:
    if split_name not in splits:
      field = "data.sources" if split_name == "train" else "data.validation_split"
      raise ConfigError(
        field,
        name if split_name == "train" else split_name,
        f"{name} has no split {split_name!r}; it has {', '.join(sorted(splits))}",
      )
  try:
    parts = [Examples(name, s, builder.as_data_source(s), data.text_field) for s in split_names]
  # This is raised for file formats that only TensorFlow can read.
  except NotImplementedError as error:
    stored = builder.info.file_format.value
    raise ConfigError(
      "data.sources",
      name,
      f"is prepared as {stored} and not as array_record; convert it where "
      f"TensorFlow is installed: tfds convert_format --dataset_version_dir={folder} "
      "--out_file_format=array_record --out_dir=FOLDER",
    ) from error
  # array_record raises all kinds of exceptions for files that are missing or damaged.
  except Exception as error:
    raise ConfigError(
      "data.sources",
      name,
      f"{folder} is damaged ({type(error).__name__}: {error}); prepare it again",
    ) from error
  if data.validation_split:
    train, validation = (Subset(part, range(len(part))) for part in parts)
    return fingerprint, {"train": train, "validation": validation}
  return fingerprint, split(name, parts[0], data.validation_fraction)


def _folder(name: str, data: DataOptions) -> Any:
  """Returns the folder DATA_DIR/NAME/VERSION of the dataset.

  If the source names no version, this is the newest one that is prepared.

  Raises:
    ConfigError: If the dataset is not prepared.
  """
  dataset, _, version = name.partition(":")[2].partition(":")
  # epath can read remote paths such as gs://, too.
  from etils import epath

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
    metadata_files = [
      p for pattern in ("*/*/features.json", "*/*/*/features.json") for p in root.glob(pattern)
    ]
    prepared = sorted(p.relative_to(root).parent.as_posix() for p in metadata_files)
    listing = (
      f"prepared there: {', '.join(prepared[:8])}" if prepared else "nothing is prepared there"
    )
    raise ConfigError(
      "data.sources",
      name,
      f"is not prepared in {root} (data.tfds_dir; {listing}); prepare it once with "
      f"tfds.builder({dataset!r}, data_dir={str(root)!r}, file_format='array_record')"
      ".download_and_prepare() in Python",
    )
  return max(versions, key=lambda p: tuple(map(int, p.name.split("."))))


def _fingerprint(folder, field: str) -> str:
  """Returns the SHA-256 of what identifies the text, without reading the text itself.

  This is the name, the version and the features of the dataset, and the shards and sizes of each
  split.
  """
  info = json.loads((folder / "dataset_info.json").read_text())
  identity = {key: info.get(key) for key in ("name", "version", "configName", "splits")}
  text = json.dumps([field, identity, (folder / "features.json").read_text()], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
