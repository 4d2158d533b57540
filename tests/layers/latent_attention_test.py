"""Tests latent attention against loops over heads and places.

Also tests what a position sees, and the number of parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from moe_jax.layers import LatentAttention, LatentOptions, LayerContext

pytestmark = pytest.mark.numerics

B, L, D = 2, 6, 8
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
POSITIONS = jnp.asarray([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
ROWS, PLACES = np.asarray(SEGMENTS), np.asarray(POSITIONS)
CONTEXT = LayerContext(jnp.zeros((B, L), jnp.int32), SEGMENTS, POSITIONS)
SIZES = dict(kv_rank=5, nope_dim=4, rope_dim=2, value_dim=6)


def layer_and_weights(query_rank, **changes):
  """Returns the layer and random weights, because the scales of norms are 1 at initialisation."""
  layer = LatentAttention(LatentOptions(query_rank=query_rank, **SIZES), num_heads=3, **changes)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((B, L, D)), CONTEXT)["params"]
  rng = np.random.default_rng(0)
  return layer, jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, nn.unbox(shapes)
  )


def rms(t, scale):
  return t / np.sqrt(np.mean(t**2, axis=-1, keepdims=True) + 1e-6) * scale


def rotated(pair, position):
  """Rotates a pair of features whose frequency is theta^0 = 1."""
  cos, sin = np.cos(position), np.sin(position)
  return np.array([[cos, -sin], [sin, cos]]) @ pair


def by_loops(w, x, query_rank):
  y = np.zeros(x.shape)
  latent = rms(x @ w["latent"], w["latent_norm"]["scale"])
  for b, h, i in np.ndindex(B, 3, L):
    from_x = rms(x @ w["query_latent"], w["query_latent_norm"]["scale"]) if query_rank else x
    q = from_x[b, i] @ w["query"][:, h]
    scores, visible_keys = [], [j for j in range(i + 1) if ROWS[b, j] == ROWS[b, i]]
    for j in visible_keys:
      unrotated_part = q[:4] @ (latent[b, j] @ w["key"][:, h])
      rotated_part = rotated(q[4:], PLACES[b, i]) @ rotated(x[b, j] @ w["key_rope"], PLACES[b, j])
      scores.append((unrotated_part + rotated_part) / np.sqrt(4 + 2))
    for s, j in zip(scores, visible_keys, strict=True):
      y[b, i] += (
        np.exp(s) / np.sum(np.exp(scores)) * (latent[b, j] @ w["value"][:, h]) @ w["output"][h]
      )
  return y


@pytest.mark.parametrize("query_rank", [0, 7])
def test_equals_loops(query_rank):
  # Catches a latent that is not normalised or is normalised together with the rotated key, a
  # rotated key that is made from the latent or per head, a factor of 1/sqrt(nope_dim), rotation of
  # the wrong part, and a missing latent of the queries.
  layer, w = layer_and_weights(query_rank)
  x = np.random.default_rng(1).normal(size=(B, L, D)).astype(np.float32)
  y = tiny.quick_jit(layer.apply)({"params": w}, x, CONTEXT)
  np.testing.assert_allclose(y, by_loops(w, x, query_rank), atol=2e-5)


def test_what_a_position_sees():
  # Catches later tokens, other documents or padding in an average.
  layer, w = layer_and_weights(7)
  w = jax.tree.map(jnp.asarray, w)
  x = jax.random.normal(jax.random.key(0), (1, L, D))
  one = LayerContext(*(leaf[:1] for leaf in (CONTEXT.token_ids, SEGMENTS, POSITIONS)))
  jacobian = tiny.quick_jit(
    jax.jacrev(lambda x: jnp.sum(jnp.sin(layer.apply({"params": w}, x, one)[0]), -1))
  )(x)
  sees = np.asarray(jnp.abs(jacobian[:, 0]).max(axis=-1) > 1e-7)
  np.testing.assert_array_equal(sees, np.tril(np.asarray(SEGMENTS[0][:, None] == SEGMENTS[0])))


def mla(d, nh, ql, kvl, nope, rope, v):
  """Returns the number of parameters of DeepSeek's attention, counted from the released shapes."""
  q = d * ql + ql + ql * nh * (nope + rope) if ql else d * nh * (nope + rope)
  return q + d * (kvl + rope) + kvl + kvl * nh * (nope + v) + nh * v * d


@pytest.mark.parametrize(
  "d, nh, ql, kvl",
  [(5120, 128, 1536, 512), (2048, 16, 0, 512), (7168, 128, 1536, 512)],
  ids=["V2", "V2-Lite", "V3"],
)
def test_parameters_of_the_released_models(d, nh, ql, kvl):
  # Catches a rotated key per head, a missing norm, and a projection that the paper does not have.
  layer = LatentAttention(LatentOptions(kvl, ql, nope_dim=128, rope_dim=64), num_heads=nh)
  shapes = jax.eval_shape(
    layer.init, jax.random.key(0), jax.ShapeDtypeStruct((B, L, d), jnp.float32), CONTEXT
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == mla(d, nh, ql, kvl, 128, 64, 128)


def test_bfloat16():
  # Catches a norm or a rotation that makes the residual stream float32.
  layer, w = layer_and_weights(7, dtype=jnp.bfloat16)
  assert (
    jax.eval_shape(layer.apply, {"params": w}, jnp.ones((B, L, D), jnp.bfloat16), CONTEXT).dtype
    == jnp.bfloat16
  )
