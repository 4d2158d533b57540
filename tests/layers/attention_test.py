"""Tests attention against plain loops, and the properties of rotary position embedding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from moe_jax import options
from moe_jax.layers import Attention, AttentionOptions, LayerContext, rope
from moe_jax.layers.relative_bias import bucket

pytestmark = pytest.mark.numerics


B, L, D = 2, 6, 8
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
POSITIONS = jnp.asarray([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
CONTEXT = LayerContext(jnp.zeros((B, L), jnp.int32), SEGMENTS, POSITIONS)
ROWS, PLACES = np.asarray(SEGMENTS), np.asarray(POSITIONS)


def make(**fields):
  """Returns an `Attention`, whose options and other fields are both given by keyword."""
  chosen = {key: fields.pop(key) for key in options.keys(AttentionOptions) if key in fields}
  return Attention(AttentionOptions(**chosen), **fields)


def test_rope_depends_on_the_difference_of_positions_only():
  # Catches absolute positions, and rotation of q and k in opposite directions.
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

  def at(x, p):
    return rope(x, jnp.full((1, 1), p), 100.0)

  def score(i, j):
    return float(jnp.sum(at(q, i) * at(k, j)))

  assert score(5, 3) == pytest.approx(score(25, 23), abs=1e-4)
  assert score(5, 3) != pytest.approx(score(3, 5), abs=1e-3)


def test_rope_by_hand():
  # With P = 2 there is one frequency, theta^0 = 1, so that (1, 0) at position p becomes
  # (cos p, sin p). Position 0 changes nothing. Catches degrees instead of radians, and a frequency
  # whose index starts at 1.
  x = jnp.asarray([1.0, 0.0]).reshape(1, 1, 1, 2)
  np.testing.assert_allclose(
    rope(x, jnp.full((1, 1), 2), 10_000.0).ravel(), [np.cos(2), np.sin(2)], atol=1e-6
  )
  np.testing.assert_array_equal(rope(x, jnp.zeros((1, 1), jnp.int32), 10_000.0), x)


def by_loops(layer, w, x, memory=None, memory_segments=None):
  """Computes the layer in NumPy, by loops over rows, heads and places."""
  o = layer.options
  source, to = (x, ROWS) if memory is None else (np.asarray(memory), np.asarray(memory_segments))
  distance = PLACES[:, :, None] - PLACES[:, None, :]
  buckets = bucket(distance, not layer.causal, o.relative_buckets, o.relative_max_distance)
  heads = {}
  for name, rows in (("query", x), ("key", source), ("value", source)):
    t = np.einsum("bld,dhp->blhp", rows, w[name]) + (w[f"{name}_bias"] if o.qkv_bias else 0.0)
    if o.qk_norm and name != "value":
      flat = t if o.qk_norm_over == "head" else t.reshape(*t.shape[:2], -1)
      flat = (
        flat
        / np.sqrt(np.mean(flat**2, axis=-1, keepdims=True) + layer.norm_eps)
        * w[f"{name}_norm"]["scale"]
      )
      t = flat.reshape(t.shape)
    t = np.clip(t, -o.clip_qkv, o.clip_qkv) if o.clip_qkv else t
    rotate = o.position == "rope" and name != "value"
    if rotate:
      turned = o.rotary_dim or o.head_dim
      first = rope(jnp.asarray(t[..., :turned]), POSITIONS, o.rope_theta)
      t = np.concatenate([first, t[..., turned:]], axis=-1)
    heads[name] = t
  y = np.zeros(x.shape)
  for b, h, i in np.ndindex(B, o.num_heads, L):
    g = h // (o.num_heads // o.num_kv_heads)
    visible_keys = [
      j
      for j in range(source.shape[1])
      if to[b, j] == ROWS[b, i]
      and (to[b, j] > 0 if memory is not None else j <= i or not layer.causal)
      and (not o.sliding_window or i - j < o.sliding_window)
    ]
    scores = [
      heads["query"][b, i, h] @ heads["key"][b, j, g] * (o.query_scale or o.head_dim**-0.5)
      for j in visible_keys
    ]
    if o.position == "relative":
      scores += w["relative_bias"][h, buckets[b, i, visible_keys]]
    total = np.sum(np.exp(scores)) + (np.exp(w["sink_bias"][h]) if o.sinks else 0)
    for s, j in zip(scores, visible_keys, strict=True):
      y[b, i] += np.exp(s) / total * heads["value"][b, j, g] @ w["output"][h]
  return y + w["output_bias"] if o.output_bias else y


def check(layer, *memory):
  """Compares the layer with the loops, and returns its weights and output.

  All weights are drawn at random, so that none of them is 0 or 1 as at initialisation.
  """
  rng = np.random.default_rng(0)

  def draw(shape):
    return rng.normal(size=shape).astype(np.float32)

  x = draw((B, L, D))
  shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x, CONTEXT, *memory))["params"]
  w = jax.tree.map(lambda leaf: draw(leaf.shape) / 2, shapes)
  y = tiny.quick_jit(layer.apply)({"params": w}, x, CONTEXT, *memory)
  np.testing.assert_allclose(y, by_loops(layer, w, x, *memory), atol=2e-5)
  return w, y


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_grouped_queries_equal_loops_over_heads(kv_heads):
  # Catches query heads that read the wrong key-value head, a missing 1/sqrt(P), and a softmax over
  # the wrong axis.
  w, _ = check(make(num_heads=4, num_kv_heads=kv_heads, head_dim=6))
  assert set(w) == {"query", "key", "value", "output"}


RELATIVE = {"position": "relative", "relative_buckets": 4, "relative_max_distance": 4}
OPTIONS = [
  {"position": "none"},
  {"causal": False},
  {"qkv_bias": True},
  {"output_bias": True},
  {"qk_norm": True, "norm_eps": 0.09},
  {"clip_qkv": 0.7},
  {"qk_norm": True, "clip_qkv": 0.7},
  {"qk_norm": True, "qk_norm_over": "head"},
  {"rotary_dim": 4},
  {"sinks": True},
  {"sliding_window": 2},
  {"query_scale": 1.0},
  RELATIVE,
  RELATIVE | {"causal": False},
  {
    "qkv_bias": True,
    "qk_norm": True,
    "clip_qkv": 0.7,
    "sliding_window": 3,
    "query_scale": 0.3,
    "sinks": True,
    **RELATIVE,
  },
]


@pytest.mark.parametrize("fields", OPTIONS, ids=lambda o: "-".join(o))
def test_options_equal_loops(fields):
  # Catches a bias after the clip, a clip before the norm (OLMoE normalises first), a norm per head
  # instead of one per token, a norm after the rotation or of values, and a norm with another
  # epsilon. Catches a relative bias of another query head of the same group, distances of the wrong
  # sign, and a relative bias that is scaled with the scores. Catches a sink of another head, and
  # rotation of the last features where it is of the first.
  w, _ = check(make(num_heads=4, num_kv_heads=2, head_dim=6, **fields))
  vectors = (
    {"query_bias": (4, 6), "key_bias": (2, 6), "value_bias": (2, 6)} if "qkv_bias" in fields else {}
  )
  vectors |= {"output_bias": (D,)} if "output_bias" in fields else {}
  if "qk_norm" in fields:
    by_head = "qk_norm_over" in fields
    vectors |= {"query_norm": (6 if by_head else 24,), "key_norm": (6 if by_head else 12,)}
  vectors |= {"sink_bias": (4,)} if "sinks" in fields else {}
  vectors |= {"relative_bias": (4, 4)} if fields.get("position") == "relative" else {}
  shapes = {name: jax.tree.leaves(leaf)[0].shape for name, leaf in w.items()}
  assert shapes == vectors | {
    "query": (D, 4, 6),
    "key": (D, 2, 6),
    "value": (D, 2, 6),
    "output": (4, 6, D),
  }


def test_norm_and_clip_by_hand():
  # There is one head of two features. The query is (3, 4), and the scale of its norm is (1, 2). The
  # RMS of sqrt(12.5) makes it (0.849, 2.263), which is clipped at 1 to (0.849, 1). Without the
  # norm, (3, 4) is clipped to (1, 1). The query at the second place sees two keys. The first key is
  # 0 and has the value (1, 0); the other one has the value (0, 0). Catches a clip before the norm,
  # which would make the query (1, 2), and a clip that is left out with or without a norm.
  ids, x = jnp.ones((1, 2), jnp.int32), jnp.asarray([[[0.0, 0, 1], [1.0, 0, 0]]])
  context = LayerContext(ids, ids, jnp.asarray([[0, 1]]))

  def column(first, second, third):
    return jnp.asarray([first, second, third], jnp.float32).reshape(3, 1, 2)

  w = {
    "query": column((3, 4), (0, 0), (0, 0)),
    "key": column((0.25, 0.5), (0, 0), (0, 0)),
    "value": column((0, 0), (0, 0), (1, 0)),
    "output": jnp.asarray([[[1.0, 0, 0], [0, 1, 0]]]),
  }
  norms = {
    "query_norm": {"scale": jnp.asarray([1.0, 2.0])},
    "key_norm": {"scale": jnp.asarray([0.25, 0.25])},
  }
  clipped = {
    "num_heads": 1,
    "num_kv_heads": 1,
    "head_dim": 2,
    "position": "none",
    "query_scale": 1.0,
    "clip_qkv": 1.0,
  }
  # The key (0.25, 0.5) is divided by its RMS of sqrt(0.15625) and multiplied by 0.25.
  key = np.asarray([0.25, 0.5]) / np.sqrt(0.15625) * 0.25
  for fields, params, score in (
    (clipped | {"qk_norm": True}, w | norms, np.asarray([3 / np.sqrt(12.5), 1.0]) @ key),
    (clipped, w, 0.75),
  ):
    y = make(**fields).apply({"params": params}, x, context)
    np.testing.assert_allclose(y[0, 1], [1 / (1 + np.exp(score)), 0, 0], atol=1e-5)


def test_a_stack_brings_its_table():
  # Catches a layer that makes its own table although the stack has one.
  layer = make(num_heads=4, num_kv_heads=2, head_dim=6, **RELATIVE)
  x = jax.random.normal(jax.random.key(0), (B, L, D))
  params = nn.unbox(layer.init(jax.random.key(1), x, CONTEXT))["params"]
  shared = CONTEXT.replace(bias_table=params["relative_bias"])
  rest = {name: leaf for name, leaf in params.items() if name != "relative_bias"}
  assert set(jax.eval_shape(layer.init, jax.random.key(1), x, shared)["params"]) == set(rest)
  np.testing.assert_array_equal(
    layer.apply({"params": rest}, x, shared), layer.apply({"params": params}, x, CONTEXT)
  )


MEMORY_SEGMENTS = jnp.asarray([[2, 2, 1, 0], [0, 2, 0, 0]])


def test_attention_to_a_memory_equals_loops():
  # The text of the second row is document 1, of which its memory has nothing. Catches a causal mask
  # over the memory, padding that sees the memory's padding, and an average over other documents for
  # a query that sees nothing.
  layer = make(num_heads=4, num_kv_heads=2, head_dim=6, position="none", qk_norm=True)
  _, y = check(layer, jax.random.normal(jax.random.key(3), (B, 4, D)), MEMORY_SEGMENTS)
  assert not np.any(y[1]) and not np.any(y[0, 5]) and np.all(np.any(y[0, :5], axis=-1))


def test_a_memory_has_segments_and_no_positions():
  # Catches keys that are rotated by the queries' positions, and a memory that all documents of a
  # row see.
  x = jnp.ones((B, L, D))
  for position, memory in (("rope", (x, SEGMENTS)), ("none", (x,))):
    with pytest.raises(ValueError, match="memory"):
      make(num_heads=2, num_kv_heads=2, head_dim=4, position=position).init(
        jax.random.key(0), x, CONTEXT, *memory
      )


def test_dropout_of_weights_only_in_training():
  # All values are 1, so that without dropout every output is 1. Catches dropout at evaluation, and
  # dropout of outputs, which would multiply them by 0 or 2.
  layer = make(num_heads=1, num_kv_heads=1, head_dim=1, position="none", dropout=0.5)
  x = jnp.ones((1, 64, 1))
  ids = jnp.ones((1, 64), jnp.int32)
  w = {name: jnp.ones((1, 1, 1)) for name in ("query", "key", "value", "output")}

  def run(train):
    return tiny.quick_jit(
      lambda key: layer.apply(
        {"params": w}, x, LayerContext(ids, ids, 0 * ids, train=train), rngs={"dropout": key}
      )
    )(jax.random.key(0))

  np.testing.assert_allclose(run(False), 1.0, atol=1e-6)
  dropped = run(True)
  assert len(np.unique(dropped.round(4))) > 16 and float(dropped.mean()) == pytest.approx(
    1.0, abs=0.3
  )


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_scores_begin_with_unit_variance(scale):
  # Catches T5's unscaled scores with queries of unit variance, which would saturate the softmax.
  layer = make(num_heads=16, num_kv_heads=16, head_dim=64, query_scale=scale)
  w = nn.unbox(layer.init(jax.random.key(0), jnp.zeros((B, L, 64)), CONTEXT))["params"]
  x = jax.random.normal(jax.random.key(1), (2, 64, 64))
  q, k = (
    jnp.einsum("ld,dhp->lhp", rows, w[name]) for rows, name in zip(x, ("query", "key"), strict=True)
  )
  scores = jnp.einsum("qhp,khp->hqk", q, k) * (scale or 64**-0.5)
  assert float(jnp.std(scores)) == pytest.approx(1.0, rel=0.1)


def test_softmax_is_float32_in_a_bfloat16_model():
  # Catches bfloat16 scores, in which tokens whose scores differ by 0.4 % are equal.
  layer = make(num_heads=2, num_kv_heads=1, head_dim=4, dtype=jnp.bfloat16)
  x = jnp.ones((B, L, D), jnp.bfloat16)
  variables = jax.eval_shape(layer.init, jax.random.key(0), x, CONTEXT)
  jaxpr = str(jax.make_jaxpr(layer.apply)(variables, x, CONTEXT))
  assert set(re.findall(r":(\w+)\[[\d,]*\] = exp ", jaxpr)) == {"f32"}
  assert jax.eval_shape(layer.apply, variables, x, CONTEXT).dtype == jnp.bfloat16


BLOCKED = [
  {},
  {"sliding_window": 2},
  {"causal": False},
  RELATIVE,
  RELATIVE | {"causal": False},
  {"qk_norm": True, "clip_qkv": 0.7, "sliding_window": 1},
]


@pytest.mark.parametrize("fields", BLOCKED, ids=str)
def test_blocks_equal_loops(fields):
  # Catches a block that gets the documents, positions or biases of other queries, and a layer that
  # ignores the options of attention in blocks.
  check(make(num_heads=4, num_kv_heads=2, head_dim=6, block=1, **fields))


@pytest.mark.parametrize("fields", [RELATIVE, {"qkv_bias": True, "sliding_window": 3}], ids=str)
def test_blocks_have_the_gradients_of_the_plain_form(fields):
  # Catches a table of biases, which blocks read but do not get as an argument, without a gradient.
  x = jax.random.normal(jax.random.key(0), (B, L, D))
  plain, blocked = (
    make(num_heads=4, num_kv_heads=2, head_dim=6, block=block, **fields) for block in (0, 1)
  )
  params = nn.unbox(plain.init(jax.random.key(1), x, CONTEXT))["params"]

  def gradient(layer):
    return jax.jit(jax.grad(lambda w: jnp.sum(layer.apply({"params": w}, x, CONTEXT) ** 2)))(params)

  jax.tree.map(
    lambda wanted, found: np.testing.assert_allclose(found, wanted, atol=1e-5),
    gradient(plain),
    gradient(blocked),
  )


def test_blocks_of_attention_to_a_memory_equal_loops():
  # Catches a causal mask over the memory, padding that sees the memory's padding, and an average
  # for a query that sees nothing.
  layer = make(num_heads=4, num_kv_heads=2, head_dim=6, position="none", block=1)
  _, y = check(layer, jax.random.normal(jax.random.key(3), (B, 4, D)), MEMORY_SEGMENTS)
  assert not np.any(y[1]) and not np.any(y[0, 5]) and np.all(np.any(y[0, :5], axis=-1))


def test_each_block_has_its_own_dropout():
  # All values are 1 and all tokens see all, so that without dropout every output is 1. Catches
  # dropout at evaluation, random numbers that repeat from block to block, and weights that are not
  # divided by the probability of being kept.
  layer = make(
    num_heads=1, num_kv_heads=1, head_dim=1, position="none", dropout=0.5, block=8, causal=False
  )
  x, ids = jnp.ones((1, 64, 1)), jnp.ones((1, 64), jnp.int32)
  w = {name: jnp.ones((1, 1, 1)) for name in ("query", "key", "value", "output")}

  def run(train):
    context = LayerContext(ids, ids, 0 * ids, train=train)
    return layer.apply({"params": w}, x, context, rngs={"dropout": jax.random.key(0)})

  np.testing.assert_allclose(run(False), 1.0, atol=1e-6)
  blocks = np.asarray(run(True)).reshape(8, 8)
  assert len(np.unique(blocks.round(4), axis=0)) == 8
  assert blocks.mean() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
  "fields, train, kernels",
  [
    ({}, True, True),
    ({"kernel": "blocks"}, True, False),
    ({"block": 64}, True, False),
    ({"dropout": 0.1}, True, False),
    ({"dropout": 0.1}, False, True),
    ({"position": "relative"}, True, False),
  ],
  ids=str,
)
def test_the_kernel_is_used_where_it_can_be(fields, train, kernels):
  # Catches a kernel that ignores biases or dropout, one that is used in rows without blocks, and
  # one that is never used.
  layer = make(
    num_heads=2, num_kv_heads=1, head_dim=4, **{"block": 32, "kernel": "splash"} | fields
  )
  x, ids = jnp.zeros((1, 128, D)), jnp.ones((1, 128), jnp.int32)
  context = LayerContext(ids, ids, ids, train=train)
  keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  program = str(jax.make_jaxpr(lambda x: layer.init_with_output(keys, x, context)[0])(x))
  assert ("pallas_call" in program) == kernels
