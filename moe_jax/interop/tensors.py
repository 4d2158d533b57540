"""Reads and writes the tensors of a folder of safetensors files, one at a time.

The library safetensors checks a file and writes it. Its tensors are read here with plain reads,
because a mapped file would count towards the memory of the process, and because the library has no
FP8 for NumPy. Orbax reads safetensors, too, but a whole array at once, where a stacked weight of
this package is made of hundreds of tensors.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The names of dtypes in the format, as far as weights have them.
DTYPES: Mapping[str, Any] = {
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
}
# What follows the name of an FP8 weight in the name of the factors of its blocks (DeepSeek-V3).
SCALE = "_scale_inv"
_LISTED = 6  # problems that a message names


class Entry(NamedTuple):
  """Where a tensor lies.

  Attributes:
    file: The file.
    offset: The byte of the file at which the tensor begins.
    dtype: The name of the dtype in the format, such as "BF16".
    shape: The shape.
  """

  file: pathlib.Path
  offset: int
  dtype: str
  shape: tuple[int, ...]


class Reader:
  """The tensors of a folder, which are read when they are asked for.

  Attributes:
    folder: The folder.
    entries: Name -> where the tensor lies. Factors of FP8 blocks are not among them.
  """

  def __init__(self, folder: pathlib.Path, block: tuple[int, int] | None = None):
    """Reads the index and the headers of all files.

    Args:
      folder: The folder.
      block: Rows and columns of a block of an FP8 weight that shares one factor; None means that
        there are no such weights.

    Raises:
      ConfigError: If there are no safetensors, if the index is no index, or names an absent file, a
        file outside the folder or a tensor that its file does not hold, or if a file is damaged.
    """
    self.folder, self._block = folder, block
    problems: list[str] = []
    found: dict[str, Entry] = {}
    for file, wanted in _files(folder).items():
      try:
        entries = _header(folder / file)
      except ValueError as error:
        problems.append(f"{file} {error}")
        continue
      if wanted is not None:
        problems += [f"{file} lacks {name} of {INDEX}" for name in wanted - entries.keys()]
        problems += [f"{file} holds {name}, not in {INDEX}" for name in entries.keys() - wanted]
      problems += [f"{name} is in two files" for name in entries.keys() & found.keys()]
      found |= entries
    refuse("checkpoint", folder, problems)
    self._scales = {
      name: entry
      for name, entry in found.items()
      if name.endswith(SCALE) and name.removesuffix(SCALE) in found
    }
    self.entries = {name: entry for name, entry in found.items() if name not in self._scales}

  def dtype(self, name: str) -> np.dtype:
    """Returns the dtype in which `read` returns a tensor; FP8 weights become bfloat16.

    Raises:
      ConfigError: If weights cannot have the dtype of the tensor.
    """
    kind = self.entries[name].dtype
    if kind not in DTYPES:
      raise ConfigError("checkpoint", str(self.folder), f"{name} has the dtype {kind}, no weight's")
    return np.dtype(ml_dtypes.bfloat16 if kind.startswith("F8") else DTYPES[kind])

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor; FP8 weights are multiplied by the factors of their blocks in float32.

    Raises:
      ConfigError: If the dtype is no weight's, or if an FP8 weight has no factors.
    """
    dtype, array = self.dtype(name), _read(self.entries[name])
    if not self.entries[name].dtype.startswith("F8"):
      return array
    scale = self._scales.get(name + SCALE)
    if scale is None or self._block is None:
      raise ConfigError("checkpoint", str(self.folder), f"{name} is FP8 without factors {SCALE}")
    factors = _read(scale).astype(np.float32)
    for axis, size in enumerate(self._block):
      factors = np.repeat(factors, size, axis=axis)
    return (array.astype(np.float32) * factors[: array.shape[0], : array.shape[1]]).astype(dtype)


class Writer:
  """Writes tensors into a folder, as files of a bounded size and, if there are several, an index.

  Args:
    folder: The folder, which exists.
    largest: The most bytes of a file, unless a single tensor has more.
  """

  def __init__(self, folder: pathlib.Path, largest: int = 5 * 10**9):
    self._folder, self._largest = folder, largest
    self._waiting: dict[str, np.ndarray] = {}
    self._files: list[list[str]] = []
    self._total = 0

  def add(self, name: str, array: np.ndarray) -> None:
    """Adds a tensor, which is written with others as soon as they fill a file."""
    held = sum(each.nbytes for each in self._waiting.values())
    if self._waiting and held + array.nbytes > self._largest:
      self._flush()
    self._waiting[name] = np.ascontiguousarray(array)
    self._total += array.nbytes

  def close(self) -> None:
    """Writes what is left, gives the files their names, and writes the index."""
    self._flush()
    count = len(self._files)
    if count == 1:
      os.rename(self._folder / _temporary(0), self._folder / SINGLE)
      return
    weights = {}
    for i, names in enumerate(self._files):
      file = f"model-{i + 1:05}-of-{count:05}.safetensors"
      os.rename(self._folder / _temporary(i), self._folder / file)
      weights |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weights.items()))}
    (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

  def _flush(self) -> None:
    from safetensors.numpy import save_file

    file = self._folder / _temporary(len(self._files))
    # Transformers refuses files whose metadata do not say "pt", which is true of the layout.
    save_file(self._waiting, file, metadata={"format": "pt"})
    self._files.append(list(self._waiting))
    self._waiting = {}


def refuse(field: str, value: Any, problems: Iterable[str]) -> None:
  """Raises ConfigError with all problems in one sentence, if there are any."""
  listed = sorted(set(problems))
  if listed:
    more = f"; and {len(listed) - _LISTED} more of this kind" if len(listed) > _LISTED else ""
    raise ConfigError(field, str(value), "; ".join(listed[:_LISTED]) + more)


def _temporary(number: int) -> str:
  """Returns the name of a file until the number of files is known."""
  return f"part-{number}.safetensors"


def _files(folder: pathlib.Path) -> dict[str, set[str] | None]:
  """Returns the names of the files, each with the tensors that the index says it holds.

  None means that there is no index.
  """
  index = folder / INDEX
  if not index.exists():
    if (folder / SINGLE).exists():
      return {SINGLE: None}
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    raise ConfigError(
      "checkpoint",
      str(folder),
      f"holds neither {SINGLE} nor {INDEX}"
      + (f"; {pickles[0]} is a pickle, which is not read; convert it first" if pickles else ""),
    )
  try:
    weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    assert isinstance(weights, dict) and all(isinstance(file, str) for file in weights.values())
  except (OSError, ValueError, LookupError, TypeError, AssertionError, RecursionError) as error:
    raise ConfigError(
      "checkpoint", str(folder), f"its {INDEX} is no index, which has a weight_map; copy it again"
    ) from error
  files: dict[str, set[str] | None] = {}
  for name, file in weights.items():
    wanted = files.setdefault(file, set())
    assert wanted is not None
    wanted.add(name)
  # A name with a directory could lead anywhere on this machine.
  outside = [file for file in files if pathlib.PurePath(file).name != file or "\\" in file]
  refuse("checkpoint", folder, [f"{INDEX} names {file!r}, outside the folder" for file in outside])
  absent = [file for file in files if not (folder / file).is_file()]
  refuse("checkpoint", folder, [f"{INDEX} names {file}, which is not there" for file in absent])
  if not files:
    raise ConfigError("checkpoint", str(folder), f"its {INDEX} names no tensors")
  return files


def _header(path: pathlib.Path) -> dict[str, Entry]:
  """Returns the tensors of a file.

  Raises:
    ValueError: If the file is damaged; the message is the rest of a sentence about it.
  """
  from safetensors import SafetensorError, safe_open

  try:
    # The library checks that the tensors lie one after the other and fill the file.
    with safe_open(path, framework="numpy"):
      pass
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(length))
  except (SafetensorError, OSError, ValueError) as error:
    reason = re.sub(r"^Error while deserializing header: ", "", str(error))
    raise ValueError(f"is damaged or cut off ({reason})") from error
  return {
    name: Entry(path, 8 + length + each["data_offsets"][0], each["dtype"], tuple(each["shape"]))
    for name, each in header.items()
    if name != "__metadata__"
  }


def _read(entry: Entry) -> np.ndarray:
  """Returns the tensor that lies there."""
  flat = np.fromfile(
    entry.file, DTYPES[entry.dtype], count=math.prod(entry.shape), offset=entry.offset
  )
  return flat.reshape(entry.shape)
