"""A language model with a few thousand weights, and rows of packed documents as its inputs."""

import jax.numpy as jnp
import numpy as np
import tiny

from configs import base
from moe_jax import assembly, sharding

V, L = 32, 8
SIZES = {
  "d_model": 16,
  "num_layers": 1,
  "num_heads": 2,
  "num_kv_heads": 1,
  "head_dim": 4,
  "d_ff": 24,
  "moe": {"first": 0, "num_experts": 4, "d_ff": 12, "dispatcher": {"name": "einsum"}},
}


def make(**changes):
  """Returns the model.

  Args:
    **changes: Keys of config.model and their values. `__` stands for a dot, as in `moe__d_ff`.
  """
  c = base.get_config()
  c.model.update(SIZES)
  c.model.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in changes.items()}
  )
  return assembly.model(c, V, sharding.make_mesh({"data": 1}))


def packed(rows):
  """Returns (tokens, segment_ids, positions) of rows of packed documents.

  Args:
    rows: The lengths of the documents of each row. The rest of a row is padding.
  """
  tokens = np.stack([np.random.default_rng(i).permutation(V)[:L] for i in range(len(rows))])
  segments, positions = np.zeros((2, len(rows), L), np.int32)
  for r, lengths in enumerate(rows):
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    segments[r, : len(ids)] = ids
    positions[r, : len(ids)] = np.concatenate([np.arange(n) for n in lengths])
  return tuple(jnp.asarray(a, jnp.int32) for a in (tokens, segments, positions))


def initialise(model, batch):
  """Returns random variables of the model, see `tiny.weights`."""
  return tiny.weights(model, *batch)


def run(model, variables, batch, return_routing=False, **others):
  """Applies the model outside training and returns its outputs."""
  return tiny.applied(model, train=False, return_routing=return_routing)(variables, batch, others)
