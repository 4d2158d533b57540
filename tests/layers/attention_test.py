"""Attention against plain loops, and the properties of rotary positions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from moe_jax.layers import Attention, LayerContext, rope
from moe_jax.layers.attention import visible

pytestmark = pytest.mark.numerics

B, L, D = 2, 6, 8
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
POSITIONS = jnp.asarray([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
CONTEXT = LayerContext(jnp.zeros((B, L), jnp.int32), SEGMENTS, POSITIONS)


def test_rope_depends_on_the_difference_of_positions_only():
  # Catches: absolute positions; rotation of q and k in opposite directions.
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
  at = lambda x, p: rope(x, jnp.full((1, 1), p), 100.0)
  score = lambda i, j: float(jnp.sum(at(q, i) * at(k, j)))
  assert score(5, 3) == pytest.approx(score(25, 23), abs=1e-4)
  assert score(5, 3) != pytest.approx(score(3, 5), abs=1e-3)


def test_rope_by_hand():
  # P = 2, one frequency, theta^0 = 1: (1, 0) at position p becomes (cos p, sin p). Position 0 changes nothing.
  # Catches: degrees for radians; a frequency that starts at index 1.
  x = jnp.asarray([1.0, 0.0]).reshape(1, 1, 1, 2)
  np.testing.assert_allclose(rope(x, jnp.full((1, 1), 2), 10_000.0).ravel(), [np.cos(2), np.sin(2)], atol=1e-6)
  np.testing.assert_array_equal(rope(x, jnp.zeros((1, 1), jnp.int32), 10_000.0), x)


def test_visible_is_causal_within_documents():
  # Catches: attention across documents, to later tokens, or from text to padding.
  expected = np.zeros((L, L), bool)
  for q in range(L):
    for k in range(q + 1):
      expected[q, k] = SEGMENTS[0, q] == SEGMENTS[0, k]
  np.testing.assert_array_equal(visible(SEGMENTS)[0], expected)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_grouped_queries_equal_loops_over_heads(kv_heads):
  # Catches: query heads read the wrong key-value head; a missing 1/sqrt(P); softmax over the wrong axis.
  layer = Attention(num_heads=4, num_kv_heads=kv_heads, head_dim=6)
  x = jax.random.normal(jax.random.key(0), (B, L, D))
  y, variables = tiny.quick_jit(layer.init_with_output)(jax.random.key(1), x, CONTEXT)
  w = nn.unbox(variables)["params"]
  q, k, v = (np.einsum("bld,dhp->blhp", x, w[name]) for name in ("query", "key", "value"))
  q, k = (np.asarray(rope(jnp.asarray(t), POSITIONS, 10_000.0)) for t in (q, k))
  expected = np.zeros((B, L, D))
  for b in range(B):
    for h in range(4):
      g = h // (4 // kv_heads)
      for i in range(L):
        seen = [j for j in range(i + 1) if SEGMENTS[b, j] == SEGMENTS[b, i]]
        scores = np.exp([q[b, i, h] @ k[b, j, g] / np.sqrt(6) for j in seen])
        mixed = sum(s * v[b, j, g] for s, j in zip(scores / scores.sum(), seen, strict=True))
        expected[b, i] += mixed @ w["output"][h]
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_softmax_is_float32_in_a_bfloat16_model():
  # Catches: bfloat16 scores, which tie tokens that differ by 0.4 %.
  layer = Attention(num_heads=2, num_kv_heads=1, head_dim=4, dtype=jnp.bfloat16)
  x = jnp.ones((B, L, D), jnp.bfloat16)
  variables = jax.eval_shape(layer.init, jax.random.key(0), x, CONTEXT)
  jaxpr = str(jax.make_jaxpr(layer.apply)(variables, x, CONTEXT))
  assert set(re.findall(r":(\w+)\[[\d,]*\] = exp ", jaxpr)) == {"f32"}
  assert jax.eval_shape(layer.apply, variables, x, CONTEXT).dtype == jnp.bfloat16
