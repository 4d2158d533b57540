"""Weights by their unrolled names, and the checks that all operations share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.interop import unrolled

# Unrolled name, such as "layer_3/ffn/up" -> array.
Weights = Mapping[str, np.ndarray]

MATRICES = ("up", "gate", "down")
_FFN = re.compile(r"(?P<layer>(?:.*/)?layer_\d+/ffn)/(?P<name>[^/]+)")


def unroll(variables: Mapping[str, Any], leaves: Sequence[unrolled.Leaf]) -> dict[str, np.ndarray]:
  """Returns the variables of a model by their unrolled names, as arrays of the host.

  Args:
    variables: The variables, as `model.apply` takes them.
    leaves: The leaves of the model; see `unrolled.leaves`.
  """
  weights = {}
  for leaf in leaves:
    value: Any = variables
    for key in leaf.path:
      value = value[key]
    value = np.asarray(value)
    for i, name in enumerate(leaf.names):
      weights[name] = value[i] if leaf.stacked else value
  return weights


def roll(weights: Weights, leaves: Sequence[unrolled.Leaf]) -> dict[str, Any]:
  """Returns the variables of a model, given its weights; the inverse of `unroll`."""
  return unrolled.nested(
    {
      leaf.path: np.stack([weights[name] for name in leaf.names])
      if leaf.stacked
      else np.asarray(weights[leaf.names[0]])
      for leaf in leaves
    }
  )


def ffns(weights: Weights) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
  """Yields the path of each FFN, such as "layer_3/ffn", and its arrays by their names.

  The arrays are those directly below the path, so that a shared expert's are left out.
  """
  found: dict[str, dict[str, np.ndarray]] = {}
  for name, array in weights.items():
    if match := _FFN.fullmatch(name):
      found.setdefault(match["layer"], {})[match["name"]] = array
  yield from found.items()


def is_sparse(ffn: Mapping[str, np.ndarray]) -> bool:
  """Returns whether the arrays of an FFN are those of experts."""
  return ffn["up"].ndim == 3


def converted(old: Weights, new: Weights) -> list[tuple[str, dict, dict]]:
  """Returns (path, old arrays, new arrays) of each dense FFN that is to become experts.

  Raises:
    ConfigError: If there is none, or if an FFN has vectors that these operations do not know.
  """
  before = dict(ffns(old))
  found = [
    (path, before[path], arrays)
    for path, arrays in ffns(new)
    if path in before and is_sparse(arrays) and not is_sparse(before[path])
  ]
  if not found:
    raise ConfigError(
      "model.moe.num_experts",
      0,
      "no dense FFN would become experts; set --config.model.moe.num_experts=8, and "
      "--config.model.moe.first=0 --config.model.moe.every=1 for experts in every layer",
    )
  for path, dense, _ in found:
    if unknown := dense.keys() - {*MATRICES}:
      raise ConfigError(
        "model.ffn_bias",
        sorted(unknown)[0],
        f"{path} has vectors beside its matrices, which experts would lack; begin with a model "
        "without biases in its FFNs",
      )
  return found


def merged(
  old: Weights, new: Weights, made: Weights, fresh: Sequence[str]
) -> dict[str, np.ndarray]:
  """Returns all weights of the new model.

  Args:
    old: The weights of the old model. Those that the new model also has are kept.
    new: Freshly drawn weights of the new model.
    made: The weights that the operation has made.
    fresh: Regular expressions of names that the new model may have besides, freshly drawn.

  Raises:
    ConfigError: If a weight has no source, or would get another shape, or if the old model has
      weights that the new one cannot hold.
  """
  result, problems = {}, []
  replaced = {path for path, _ in ffns(new) if f"{path}/up" in made}
  for name, array in new.items():
    if name in made:
      source = made[name]
    elif name in old:
      source = old[name]
    elif any(re.search(pattern, name) for pattern in fresh):
      source = array
    else:
      problems.append(f"{name} is not in the old model")
      continue
    if source.shape != array.shape:
      problems.append(f"{name} would have the shape {source.shape} and must have {array.shape}")
    result[name] = source
  for name in old.keys() - new.keys():
    if not any(name.startswith(f"{path}/") for path in replaced):
      problems.append(f"{name} has no place in the new model")
  if problems:
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise ConfigError(
      "config",
      "the new model",
      f"differs in more than its experts: {'; '.join(sorted(problems)[:3])}{more}; change only "
      "keys of model.moe",
    )
  return result
