"""A trained model that reads and writes text."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Int

from moe_jax import assembly, data, models, sharding
from moe_jax.data.options import DataOptions
from moe_jax.options import Config
from moe_jax.run.load import LoadedRun, load_run

# How a sentinel of span corruption is written, as in T5's vocabulary. 0 is that of the first span.
_SENTINEL = "<extra_id_{}>"
_SENTINELS = re.compile(r"<extra_id_(\d+)>")


class TextModel(NamedTuple):
  """A model that is ready to decode, and what turns text into its tokens and back.

  Attributes:
    model: The model, whose layers are not scanned.
    variables: Its variables, placed on the mesh.
    config: The config of the run.
    tokenizer: The tokenizer of the run.
    mesh: The mesh.
  """

  model: nn.Module
  variables: dict[str, Any]
  config: Config
  tokenizer: data.Tokenizer
  mesh: jax.sharding.Mesh

  @property
  def has_encoder(self) -> bool:
    """Whether the model reads the prompt with an encoder."""
    return DataOptions.of(self.config.data).objective == "span_corruption"

  @property
  def num_ids(self) -> int:
    """The number of ids of the tokenizer and, with an encoder, of the sentinels."""
    return data.vocab_size(DataOptions.of(self.config.data), self.tokenizer)

  @property
  def boundaries(self) -> tuple[int, ...]:
    """The tokens at which a text ends: the boundary of the next one, and eos if there is one."""
    eos = self.tokenizer.eos
    return (self.tokenizer.boundary,) if eos is None else (self.tokenizer.boundary, eos)

  @property
  def allowed(self) -> Bool[np.ndarray, "W"]:
    """Which tokens may be written: those that stand for bytes, the boundaries and sentinels."""
    allowed = np.ones(self.num_ids, bool)
    allowed[: self.tokenizer.size] = self.tokenizer.byte_lengths > 0
    allowed[list(self.boundaries)] = True
    return allowed

  def encode(self, text: str) -> list[int]:
    """Returns the tokens of a text, without a boundary; an encoder-decoder's may hold sentinels."""
    if not self.has_encoder:
      return self.tokenizer.encode(text.encode()).tolist()
    ids = []
    # The pattern has a group, so that every other part is the number of a sentinel.
    for i, part in enumerate(_SENTINELS.split(text)):
      if i % 2 and int(part) < self.num_ids - self.tokenizer.size:
        ids.append(self.num_ids - 1 - int(part))
      else:
        shown = _SENTINEL.format(part) if i % 2 else part
        ids += self.tokenizer.encode(shown.encode()).tolist()
    return ids

  def decode(self, ids: Sequence[int]) -> bytes:
    """Returns the bytes of tokens, with the names of sentinels, and nothing for boundaries."""
    text, start = b"", 0
    for i, token in enumerate([*ids, self.num_ids]):
      if token >= self.tokenizer.size:
        text += self.tokenizer.decode(np.asarray(ids[start:i], np.int32)) if i > start else b""
        if i < len(ids):
          text += _SENTINEL.format(self.num_ids - 1 - token).encode()
        start = i + 1
    return text

  @contextlib.contextmanager
  def placed(self) -> Iterator[None]:
    """Sets the mesh and the config's sharding rules for the calls of the model in the body."""
    with jax.set_mesh(self.mesh), sharding.use_rules(dict(self.config.sharding)):
      yield


def text_model(
  run: str | os.PathLike | LoadedRun | TextModel,
  step: int | None = None,
  mesh: Mapping[str, int] | None = None,
) -> TextModel:
  """Returns the model of a run, ready to decode.

  Args:
    run: The --workdir of a run, or what `load_run` or this function returned.
    step: The step of the checkpoint of a workdir. None means the newest one.
    mesh: The size of each axis of the mesh that is not 1, as in {"tensor": 4}. None means one
      device.

  Raises:
    ConfigError: The run cannot be loaded (see `load_run`), the model cannot read a text token by
      token (`assembly.check_decoding`), or the mesh does not fit the devices.
  """
  if isinstance(run, TextModel):
    return run
  loaded = run if isinstance(run, LoadedRun) else load_run(run, step)
  assembly.check_decoding(loaded.config)
  options = DataOptions.of(loaded.config.data)
  # Axes that are not named have one device.
  devices = sharding.make_mesh({"data": 1} | dict(mesh or {}))
  model, variables = models.unroll(cast(Any, loaded.model), loaded.variables)
  shapes = assembly.abstract_variables(
    _without_scan(loaded.config), assembly.vocab_size(loaded.config)
  )
  with sharding.use_rules(dict(loaded.config.sharding)):
    placed = jax.device_put(variables, sharding.param_shardings(devices, shapes))
  return TextModel(model, placed, loaded.config, data.tokenizer_of(options), devices)


def _without_scan(config: Config) -> Config:
  """Returns a copy of the config whose layers are not scanned."""
  copy = config.copy_and_resolve_references()
  copy.model.scan_layers = False
  return copy


def source_rows(sources: Sequence[Sequence[int]]) -> dict[str, Int[np.ndarray, "B M"]]:
  """Returns the sources of an encoder, with padding after each of them.

  The length M is a power of two, so that few programs are compiled for sources of many lengths.
  """
  longest = 1 << max(max(map(len, sources)) - 1, 0).bit_length()
  rows = {name: np.zeros((len(sources), longest), np.int32) for name in ("tokens", "segment_ids")}
  for row, source in enumerate(sources):
    rows["tokens"][row, : len(source)] = source
    rows["segment_ids"][row, : len(source)] = 1
  positions = np.broadcast_to(np.arange(longest, dtype=np.int32), rows["tokens"].shape)
  return rows | {"positions": positions * rows["segment_ids"]}
