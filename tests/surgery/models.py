"""Small dense and sparse models, and their weights by unrolled names, for the tests of surgery."""

import functools

import jax
import jax.numpy as jnp
import tiny

from moe_jax import assembly, sharding
from moe_jax.interop import unrolled
from moe_jax.surgery.weights import roll, unroll

V = 264
MESH = {"data": 1}


def config(directory, **changes):
  """Returns a config of two layers whose scan is compiled or not."""
  return tiny.config(
    directory,
    **{
      "model__num_layers": 2,
      "model__vocab_size": V,
      "model__moe__num_experts": 0,
      "model__moe__every": 1,
      "model__moe__router__top_k__gate_norm": "top_k",
      "model__moe__router__top_k__k": 2,
    }
    | changes,
  )


@functools.cache
def _batch():
  tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, V)
  positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), tokens.shape)
  return tokens, jnp.ones_like(tokens), positions


class Model:
  """A model of a config, with random weights by their unrolled names."""

  def __init__(self, config, seed=0):
    mesh = sharding.make_mesh(MESH)
    self.model = assembly.model(config, V, mesh)
    self.leaves = unrolled.leaves(config, V, mesh)
    self.weights = unroll(tiny.weights(self.model, *_batch(), seed=seed), self.leaves)

  def logits(self, weights=None):
    """Returns the logits of two rows."""
    variables = roll(self.weights if weights is None else weights, self.leaves)
    return jax.jit(lambda v: self.model.apply(v, *_batch(), train=False)[0])(variables)
