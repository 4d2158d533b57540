"""The model of a run, for work on its weights in Python."""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

from absl import logging
from flax import linen as nn

from moe_jax import assembly, sharding
from moe_jax.assembly.sections import check_config, default_config
from moe_jax.errors import ConfigError
from moe_jax.options import Config
from moe_jax.training import checkpoints, workdir


class LoadedRun(NamedTuple):
  """A trained model.

  Attributes:
    model: The model, for one device. `step.apply(model, variables, batch)` calls it on a batch.
    variables: Its variables as NumPy arrays, as `model.apply` takes them.
    config: The config of the run.
    name: The name of the run's folder.
    step: The step of the checkpoint.
  """

  model: nn.Module
  variables: dict[str, Any]
  config: Config
  name: str = ""
  step: int = 0


def load_run(directory: str | os.PathLike, step: int | None = None) -> LoadedRun:
  """Returns the model of a run with the variables of one of its checkpoints.

  A router of one's own must be known before, see `assembly.sections.register_router`.

  Args:
    directory: The --workdir of the run.
    step: The step of the checkpoint. None means the newest one.

  Raises:
    ConfigError: If the folder is no workdir, or has no such checkpoint or only a damaged one, or if
      the tokenizer, which says how many ids the model has, cannot be read.
  """
  folder = pathlib.Path(directory)
  config = stored_config(folder)
  saved = checkpoints.steps(folder / "checkpoints")
  if not saved or step not in (None, *saved):
    listed = f"its checkpoints are {', '.join(map(str, saved))}" if saved else "it has none"
    raise ConfigError("step", step, f"{folder} has no such checkpoint; {listed}")
  step = saved[-1] if step is None else step
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # Orbax warns about files that its own checkpoints lack.
  try:
    variables = checkpoints.load_variables(folder / "checkpoints", step)
  finally:
    logging.set_verbosity(before)
  mesh = sharding.make_mesh({"data": 1})
  model = assembly.model(config, assembly.vocab_size(config), mesh)
  return LoadedRun(model, variables, config, folder.resolve().name, step)


def _renamed(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns a config that an earlier version has stored with the keys of today.

  `model.moe.bias_update_rate` was the rate of the rule `sign`, and 0 meant that there is no rule.
  """
  model = stored.get("model")
  if not isinstance(model, dict):
    return stored
  moe = model.get("moe")
  if not isinstance(moe, dict) or "bias_update_rate" not in moe:
    return stored
  rate = moe["bias_update_rate"]
  kept = {key: value for key, value in moe.items() if key != "bias_update_rate"}
  rule = {"rule": "sign", "rate": rate} if rate else {}
  return stored | {"model": model | {"moe": kept | {"balancing": rule}}}


def stored_config(folder: pathlib.Path) -> Config:
  """Returns the config of a workdir.

  Raises:
    ConfigError: If the folder is no workdir, or its config.json is not valid.
  """
  stored = workdir.read_json(folder / "config.json", dict)
  if not stored:
    raise ConfigError(
      "workdir", str(folder), "holds no config.json; give the --workdir of a run of moe_jax.train"
    )
  config = default_config()
  with config.unlocked(), config.ignore_type():
    config.update(_renamed(stored))
  check_config(config)
  return config
