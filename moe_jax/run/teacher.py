"""Loads the teacher of a run."""

from __future__ import annotations

import pathlib

import jax

from moe_jax import assembly
from moe_jax.errors import ConfigError
from moe_jax.options import Config
from moe_jax.run.load import load_run
from moe_jax.training import optimizers, workdir
from moe_jax.training import state as states
from moe_jax.training.distill import Teacher, TeacherOptions
from moe_jax.training.options import TrainOptions
from moe_jax.training.step import apply


def load(
  config: Config, mesh: jax.sharding.Mesh, vocab_size: int, tokenizer: str
) -> Teacher | None:
  """Returns the teacher that `train.teacher` names, on the mesh of the run; None without one.

  The teacher's weights are spread over the mesh by the rules of the run.

  Args:
    config: The config of the run.
    mesh: The mesh of the run.
    vocab_size: The number of ids in the data of the run.
    tokenizer: The fingerprint of the run's tokenizer.

  Raises:
    ConfigError: If there is no such run, or if its tokenizer or vocabulary is another one.
  """
  options = TeacherOptions.of(config.train.teacher)
  if not options.workdir:
    return None
  folder = pathlib.Path(options.workdir).expanduser()
  try:
    run = load_run(folder)
  except ConfigError as error:
    raise ConfigError("train.teacher.workdir", options.workdir, str(error)) from error
  meta = workdir.read_json(folder / "meta.json", dict) or {}
  other = meta.get("tokenizer", tokenizer)
  theirs, ours = (
    assembly.fixed_vocab_size(each) or size
    for each, size in ((run.config, assembly.vocab_size(run.config)), (config, vocab_size))
  )
  if other != tokenizer or theirs != ours:
    raise ConfigError(
      "train.teacher.workdir",
      options.workdir,
      f"its model predicts {theirs} ids of another tokenizer, and this run {ours}; train a teacher "
      "with the same data.tokenizer and model.vocab_size",
    )
  model = assembly.model(run.config, ours, mesh)
  optimizer, _ = optimizers.make(optimizers.OptimizerOptions(), 1)
  rows = TrainOptions.of(config.train).microbatch
  abstract, _ = states.create(mesh, model, optimizer, 0, config.data.seq_len, rows)
  places = {"params": abstract.params}
  if abstract.router_state:
    places["router_state"] = abstract.router_state
  variables = jax.tree.map(
    lambda leaf, place: jax.device_put(leaf, place.sharding), run.variables, places
  )

  def logits(variables, batch):
    return apply(model, variables, batch, train=False)[0]

  return Teacher(logits, variables, options)
