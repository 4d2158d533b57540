"""Switch's initialisation of a student: the weights that it shares with its teacher."""

from __future__ import annotations

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.surgery.weights import Weights, ffns

_PART_OF_FFN = "/ffn/"


def inherit(old: Weights, new: Weights) -> dict[str, np.ndarray]:
  """Returns the weights of a model that takes over what another one has besides its experts.

  Switch's students are dense and get the non-expert weights of their sparse teacher (Fedus et al.
  2021, arXiv 2101.03961, Table 6). FFNs of another shape, or without a counterpart, stay as drawn;
  dense FFNs that both models have are taken over.

  Args:
    old: The weights of the teacher.
    new: Freshly drawn weights of the student.

  Raises:
    ConfigError: If the models differ in anything but FFNs.
  """
  result = {}
  problems = [name for name in old.keys() - new.keys() if _PART_OF_FFN not in name]
  same = {
    path
    for path, arrays in ffns(new)
    if all(
      f"{path}/{name}" in old and old[f"{path}/{name}"].shape == array.shape
      for name, array in arrays.items()
    )
  }
  for name, array in new.items():
    path = name[: name.rindex("/")] if "/" in name else ""
    if _PART_OF_FFN in name and path not in same:
      result[name] = array
      continue
    if name not in old or old[name].shape != array.shape:
      problems.append(name)
      continue
    result[name] = old[name]
  if problems:
    raise ConfigError(
      "config",
      "the new model",
      f"differs in more than its FFNs: {', '.join(sorted(problems)[:3])}; change only keys of "
      "model.moe, and model.d_ff",
    )
  return result
