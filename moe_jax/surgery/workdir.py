"""Makes a workdir of the weights that an operation returns."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from moe_jax import assembly, sharding
from moe_jax.interop import unrolled
from moe_jax.interop.hugging_face import CONFIG_FILE, new_folder
from moe_jax.options import Config
from moe_jax.run.load import LoadedRun, load_run
from moe_jax.surgery.weights import Weights, roll, unroll
from moe_jax.training import state as states
from moe_jax.training import workdir
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.options import TrainOptions

# (run, its weights, freshly drawn weights of the new model, the new config) -> the new weights.
Operation = Callable[[LoadedRun, Weights, Weights, Config], Mapping[str, np.ndarray]]


def make(
  source: pathlib.Path,
  destination: pathlib.Path,
  config: Config,
  operation: Operation,
  step: int | None = None,
  seed: int = 0,
) -> None:
  """Makes a workdir of a new model whose weights come from those of a run.

  All weights are in the memory of the host meanwhile.

  Args:
    source: The workdir of the run.
    destination: The workdir to make. It appears by a rename when it is complete.
    config: The config of the new model.
    operation: What makes its weights.
    step: The step of the run's checkpoint; None means the newest one.
    seed: The seed of the weights that are drawn anew.

  Raises:
    ConfigError: If the run has no such checkpoint, if the config is not valid, if the operation
      cannot be done, or if the destination exists. Nothing is left then.
  """
  assembly.validate(config)
  run = load_run(source, step)
  mesh = sharding.make_mesh({"data": 1})
  old = unroll(run.variables, unrolled.leaves(run.config, assembly.vocab_size(run.config), mesh))
  vocab_size = assembly.vocab_size(config)
  leaves = unrolled.leaves(config, vocab_size, mesh)
  new = unroll(_drawn(config, vocab_size, mesh, seed), leaves)
  made = operation(run, old, new, config)
  with new_folder("WORKDIR", destination) as folder:
    # Imported weights came with files, such as a tokenizer, which the config names where they are.
    if (source / "hugging_face").is_dir():
      shutil.copytree(source / "hugging_face", folder / "hugging_face")
    workdir.claim(folder, config)
    (folder / "config.py").write_text(CONFIG_FILE, encoding="utf-8")
    about = {"source": str(source), "step": step}
    meta = {"config": str(destination / "config.py"), "imported": about, "starts": []}
    workdir.write_json(folder / "meta.json", meta)
    variables = roll(made, leaves)
    with Checkpoints(folder / "checkpoints") as checkpoints:
      checkpoints.save_imported(
        jax.tree.map(jax.numpy.asarray, variables["params"]),
        jax.tree.map(jax.numpy.asarray, variables.get("router_state", {})),
        about,
      )


def _drawn(config: Config, vocab_size: int, mesh: jax.sharding.Mesh, seed: int) -> dict[str, Any]:
  """Returns freshly drawn variables of a config's model."""
  rows = TrainOptions.of(config.train).microbatch
  model = assembly.model(config, vocab_size, mesh)

  def draw(key):
    return nn.unbox(states.init_variables(model, key, config.data.seq_len, rows))

  with jax.set_mesh(mesh), sharding.use_rules(dict(config.sharding)):
    return jax.jit(draw)(jax.random.key(seed))
