"""A workdir with a checkpoint of random weights, for tests of what is done with trained models."""

import jax
import jax.numpy as jnp
import tiny

from moe_jax import assembly, sharding
from moe_jax.training import checkpoints, workdir
from moe_jax.training.state import TrainState


def save(directory, step=3, **changes):
  """Writes the workdir of a run, and returns its path and the model's variables.

  Args:
    directory: A folder for the workdir and the corpus.
    step: The step of the checkpoint.
    **changes: Keys of the config and their values, where `__` stands for a dot.
  """
  config = tiny.config(directory, **changes)
  model = assembly.model(config, assembly.vocab_size(config), sharding.make_mesh({"data": 1}))
  ids = jnp.zeros((4, 8), jnp.int32)
  variables = tiny.weights(model, ids, ids + 1, ids)
  state = TrainState(
    step=jnp.int32(step),
    params=variables["params"],
    opt_state=(),
    router_state=variables.get("router_state", {}),
    rng=jax.random.key(0),
  )
  place = directory / "run"
  workdir.claim(place, config)
  with checkpoints.Checkpoints(place / "checkpoints") as c:
    c.save(step, state, {}, {"seconds": 1.0})
  return place, variables
