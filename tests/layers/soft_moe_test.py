"""Tests Soft MoE against the oracle and by hand, and its treatment of padding and dtypes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from oracles.soft_moe import soft_moe

from moe_jax.layers import DenseFfn, LayerContext, LayerRouting
from moe_jax.layers.soft_moe import SoftMoeLayer

pytestmark = pytest.mark.numerics

B, L, D, E, P = 2, 6, 8, 3, 2
X = jax.random.normal(jax.random.key(0), (B, L, D))
PADDED = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 2]])


def context(segments=None, **kwargs):
  segments = jnp.ones((B, L), jnp.int32) if segments is None else segments
  return LayerContext(jnp.zeros_like(segments), segments, jnp.zeros_like(segments), **kwargs)


def make(**kwargs):
  sizes = {"num_experts": E, "slots": P, "d_ff": 5, "activation": "relu"}
  return SoftMoeLayer(**(sizes | tiny.moe_fields(**kwargs)))


def run(layer, variables, x, context):
  return tiny.quick_jit(layer.apply)(variables, x, context)


def initialise(layer, scale=3.0):
  """Returns variables whose logits are far from 0, so that an error in a softmax shows."""
  variables = nn.unbox(tiny.quick_jit(layer.init)(jax.random.key(1), X, context()))
  variables["params"]["scale"] *= scale
  return variables


def networks(w):
  """Returns the experts in NumPy: relu(x up) down, or (silu(x gate) * (x up)) down with a gate."""

  def one(e, x):
    up = x @ w["up"][e]
    if "gate" in w:
      gate = x @ w["gate"][e]
      return (up * gate / (1 + np.exp(-gate))) @ w["down"][e]
    return np.maximum(up, 0) @ w["down"][e]

  return [functools.partial(one, e) for e in range(len(w["up"]))]


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("group", [0, 4, 12])
def test_the_layer_is_the_oracle(group, activation):
  # Catches softmaxes that are exchanged or over the wrong axis, mu that is not normalised along the
  # width, slots that are mixed between experts or groups, padding in an average, and groups that
  # are not sequences.
  layer = make(group_size=group, activation=activation)
  variables = initialise(layer)
  y, aux = run(layer, variables, X, context(PADDED, return_routing=True))
  w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
  size = group or L
  x, real = np.asarray(X).reshape(-1, size, D), np.asarray(PADDED).reshape(-1, size) > 0
  results = [
    soft_moe(x[g], w["mu"], w["scale"], networks(w), np.flatnonzero(real[g])) for g in range(len(x))
  ]
  expected, dispatch, combine = (np.stack(parts) for parts in zip(*results, strict=True))
  np.testing.assert_allclose(y, expected.reshape(B, L, D), atol=1e-5)
  # A check of the oracle itself: every slot is an average of real tokens.
  np.testing.assert_allclose(dispatch.sum(1), 1, rtol=1e-12)
  # Catches the load or entropy of slots instead of experts, padding in a mean, and the expert of
  # the best slot instead of the best expert.
  mass = combine.sum(-1)[real]  # [tokens, E]
  np.testing.assert_allclose(aux.metrics["load"], mass.mean(0), rtol=1e-5)
  assert float(aux.metrics["entropy"]) == pytest.approx(
    -(mass * np.log(mass)).sum(-1).mean(), rel=1e-5
  )
  assert float(aux.metrics["max_violation"]) == pytest.approx(mass.mean(0).max() * E - 1, rel=1e-4)
  first = np.where(real, combine.sum(-1).argmax(-1), E).reshape(B, L)
  np.testing.assert_array_equal(aux.metrics["top1_expert"], first)


def test_slots_average_the_real_tokens():
  # The experts compute the relu of their input, and all tokens are the same positive vector v. Then
  # every average of real tokens is v, so that every output is v whatever the weights. Catches
  # dispatch weights that do not sum to 1 over the real tokens, and combine weights that do not sum
  # to 1 over the slots.
  layer = make(d_ff=D)
  variables = initialise(layer)
  variables["params"]["up"] = variables["params"]["down"] = jnp.tile(jnp.eye(D), (E, 1, 1))
  v = jnp.arange(1.0, D + 1)
  x = jnp.where((PADDED > 0)[..., None], v, 99.0)
  y, _ = run(layer, variables, x, context(PADDED))
  np.testing.assert_allclose(y, jnp.where((PADDED > 0)[..., None], v, 0.0), rtol=1e-5)


def test_one_expert_with_one_slot_by_hand():
  # With tokens (3, 0) and (0, 4), mu = (5, 0) and a scale of ln 3, the logits are ln 3 * (1, 0) and
  # the dispatch weights are 3/4 and 1/4. The slot holds (9/4, 1), and the network doubles it. There
  # is only this slot, so that each token gets (9/2, 2). Catches x or mu that is not normalised, a
  # scale that is not applied, and weights of 1/2 (a plain mean).
  layer = make(num_experts=1, slots=1, d_ff=2)
  variables = {
    "params": {
      "mu": jnp.asarray([5.0, 0.0]).reshape(2, 1, 1),
      "scale": jnp.asarray(math.log(3.0)),
      "up": jnp.eye(2)[None],
      "down": 2 * jnp.eye(2)[None],
    }
  }
  y, aux = run(
    layer, variables, jnp.asarray([[[3.0, 0.0], [0.0, 4.0]]]), context(jnp.ones((1, 2), jnp.int32))
  )
  np.testing.assert_allclose(y, [[[4.5, 2.0], [4.5, 2.0]]], rtol=1e-5)
  assert float(aux.metrics["logit_max"]) == pytest.approx(math.log(3.0), rel=1e-5)
  assert float(aux.metrics["load"][0]) == 1.0 and abs(float(aux.metrics["entropy"])) < 1e-6


def test_padding_changes_nothing():
  # Catches padding in a slot's average (a softmax over all tokens) or in a metric, and padding with
  # an output.
  layer = make(group_size=B * L)
  variables = initialise(layer)
  y, aux = run(layer, variables, X, context(PADDED))
  other = jnp.where((PADDED > 0)[..., None], X, 7.0 - 3.0 * X)
  y2, aux2 = run(layer, variables, other, context(PADDED))
  np.testing.assert_allclose(y2, y, atol=1e-6)
  np.testing.assert_array_equal(y[PADDED == 0], 0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), aux, aux2)
  # Adds rows of padding, which form groups without real tokens. Catches 0/0 in them, and their
  # weight in a mean.
  more, segments = jnp.concatenate([X, 5 + X]), jnp.concatenate([PADDED, jnp.zeros_like(PADDED)])
  layer3 = make(group_size=L)
  y3, aux3 = run(layer3, variables, more, context(segments))
  alone, aux4 = run(layer3, variables, X, context(PADDED))
  np.testing.assert_allclose(y3, jnp.concatenate([alone, jnp.zeros_like(X)]), atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), aux3, aux4)


def test_gradients_reach_the_router_and_are_finite_without_real_tokens():
  # Catches a stop_gradient around a softmax, and NaN from a masked softmax or from the norm of a
  # vector of zeros.
  layer = make()
  variables = initialise(layer, 1.0)
  segments = PADDED.at[1].set(0)
  x = X.at[0, 0].set(0.0)

  def loss(v, x):
    return jnp.sum(jnp.sin(layer.apply(v, x, context(segments))[0]))

  by_weight, by_input = tiny.quick_jit(jax.grad(loss, argnums=(0, 1)))(variables, x)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves((by_weight, by_input)))
  assert float(jnp.abs(by_weight["params"]["mu"]).max()) > 1e-3
  assert float(jnp.abs(by_weight["params"]["scale"])) > 1e-3
  np.testing.assert_array_equal(by_input[segments == 0], 0)


def test_logits_are_float32_in_a_bfloat16_model():
  # Catches logits or softmaxes in bfloat16, and an output in float32.
  layer = make(dtype=jnp.bfloat16)
  x = X.astype(jnp.bfloat16)
  variables = initialise(layer, 1.0)
  jaxpr = str(jax.make_jaxpr(lambda v, x: layer.apply(v, x, context()))(variables, x))
  assert re.search(r":f32\[2,6,3,2\] = dot_general", jaxpr) and not re.search(
    r":bf16\[2,6,3,2\] = dot_gen", jaxpr
  )
  # The softmaxes compute exp, and the norms of tokens and of directions compute rsqrt.
  for operation in ("exp", "rsqrt"):
    assert set(re.findall(rf":(\w+)\[[\d,]*\] = {operation} ", jaxpr)) == {"f32"}
  assert jax.eval_shape(layer.apply, variables, x, context())[0].dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_a_bias_is_refused_and_empty_routing_is_not():
  # Catches loss-free balancing that silently does nothing, and an error for every LayerRouting,
  # which a decoder always passes.
  def apply(routing):
    return jax.eval_shape(lambda v: layer.apply(v, X, context(), routing), variables)

  layer = make()
  variables = jax.eval_shape(lambda: layer.init(jax.random.key(1), X, context()))
  # Every layer gets a salt, which Soft MoE does not read.
  assert apply(LayerRouting(salt=jnp.uint32(1)))[0].shape == X.shape
  with pytest.raises(ValueError, match="neither a balancing bias"):
    apply(LayerRouting(bias=jnp.zeros(E)))


def test_shared_experts_are_added_once():
  # Catches shared experts that see slots, or whose output is averaged.
  layer = make(shared=functools.partial(DenseFfn, d_ff=7, activation="gelu"))
  variables = initialise(layer)
  alone = DenseFfn(d_ff=7, activation="gelu").apply(
    {"params": variables["params"]["shared"]}, X, context()
  )[0]
  np.testing.assert_allclose(
    run(layer, variables, X, context())[0],
    run(make(), variables, X, context())[0] + alone,
    atol=1e-5,
  )


def test_weights_at_the_start():
  # Catches other names of parameters, a scale that does not begin at 1, mu that is not lecun-normal
  # (which has a variance of 1 / (E D) for this shape, as in vmoe), and experts whose output is not
  # scaled.
  layer = make(d_ff=64, slots=64, output_scale=0.5)
  w = initialise(layer, 1.0)["params"]
  assert {name: leaf.shape for name, leaf in w.items()} == {
    "mu": (D, E, 64),
    "scale": (),
    "up": (E, D, 64),
    "down": (E, 64, D),
  }
  assert float(w["scale"]) == 1.0 and float(jnp.std(w["mu"])) == pytest.approx(
    (E * D) ** -0.5, rel=0.1
  )
  assert float(jnp.std(w["down"])) == pytest.approx(0.5 * 64**-0.5, rel=0.1)
