"""Tests the MoE layer against the oracle, and its treatment of padding, dtypes and jitter."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from flax import linen as nn

from moe_jax.dispatch import DISPATCHERS
from moe_jax.errors import ConfigError
from moe_jax.layers import (
  LOSSES,
  DenseFfn,
  GroupOptions,
  LayerContext,
  LayerRouting,
  MoeLayer,
  RouterFacts,
  load_without_noise,
)
from moe_jax.layers.moe import choices
from moe_jax.routing import ROUTERS, RoutingPlan
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.numerics

B, L, D, E = 2, 6, 8, 4
X = jax.random.normal(jax.random.key(0), (B, L, D))
PADDED = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 2]])


# Only the router strictly_balanced has thresholds and therefore a threshold loss.
ALL_BUT_THRESHOLD = tuple(name for name in LOSSES if name != "threshold")


def context(segments=None, **kwargs):
  segments = jnp.ones((B, L), jnp.int32) if segments is None else segments
  return LayerContext(jnp.zeros_like(segments), segments, jnp.zeros_like(segments), **kwargs)


def make(k=2, dispatcher="einsum", gate_norm="none", **kwargs):
  return MoeLayer(
    num_experts=E,
    d_ff=5,
    activation="gelu",
    router=functools.partial(top_k, k=k, gate_norm=gate_norm),
    dispatcher=DISPATCHERS[dispatcher],
    platform="cpu",
    **tiny.moe_fields(**kwargs),
  )


def run(layer, variables, x, context, routing=None, seed=0):
  """Runs `layer.apply` as one compiled program, which is faster than compiling it op by op."""
  rngs = {"router": jax.random.key(seed)} if context.train else {}
  return tiny.quick_jit(layer.apply)(variables, x, context, routing, rngs=rngs)


def initialise(layer, scale=30.0):
  """Returns variables whose router is confident, so that an error in the gates shows.

  NumPy draws them, because compiling Flax's initialisers would take as long as compiling the layer.
  """
  shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(1), X, context()))
  rng, params = np.random.default_rng(1), {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
    inputs = (
      100 * leaf.shape[0] if path[-1].key == "router" else leaf.shape[-2] if leaf.ndim > 1 else 1
    )
    params[path] = jnp.asarray(rng.normal(size=leaf.shape) * inputs**-0.5, leaf.dtype)
  variables = {
    "params": jax.tree_util.tree_map_with_path(lambda path, _: params[path], shapes["params"])
  }
  variables["params"]["router"] *= scale
  return variables


@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_layer_is_the_oracle(k, factor):
  # Catches groups that are not sequences, a capacity from the wrong S, and gates of a softmax over
  # the wrong axis.
  layer = make(k, capacity_factor=factor)
  variables = initialise(layer)
  y, aux = run(layer, variables, X, context(PADDED))
  w = jax.tree.map(np.asarray, variables["params"])
  capacity = None if factor is None else max(1, round(factor * L / E))
  dropped = assignments = 0
  for b in range(B):
    plan = reference.top_k(
      np.asarray(X[b]) @ w["router"], k, "none", valid=np.asarray(PADDED[b] > 0)
    )
    kept = reference.drop_overflow(plan, E, capacity)
    expected = np.zeros((L, D))
    for token, expert, gate in kept:
      expected[token] += gate * (
        np.asarray(jax.nn.gelu(X[b, token] @ w["up"][expert])) @ w["down"][expert]
      )
    np.testing.assert_allclose(y[b], expected, atol=1e-5)
    assignments, dropped = assignments + len(plan), dropped + len(plan) - len(kept)
  assert float(aux.metrics["drop_rate"]) == pytest.approx(dropped / assignments)


@pytest.mark.parametrize(
  "k, gate_norm, learns", [(1, "none", True), (1, "top_k", False), (2, "top_k", True)]
)
def test_gradient_of_the_router(k, gate_norm, learns):
  # Catches a gate that carries no gradient. At K = 1, renormalised gates are the constant 1, so the
  # router cannot learn, which is a known trap.
  layer = make(k, gate_norm=gate_norm)
  variables = initialise(layer, 1.0)

  def loss(v):
    return jnp.sum(jnp.sin(layer.apply(v, X, context())[0]))

  grad = tiny.quick_jit(jax.grad(loss))(variables)["params"]["router"]
  assert (float(jnp.abs(grad).max()) > 1e-3) == learns


@pytest.mark.parametrize(
  "router, options, network",
  [
    ("top_k", {}, "linear"),
    ("noisy_top_k", {"k": 2}, "tanh"),
    ("hierarchical", {"groups": 2}, "linear"),
    ("sigmoid_bias", {"k": 2}, "linear"),
    ("expert_choice", {}, "linear"),
    ("sinkhorn", {}, "linear"),
  ],
)
def test_router_is_float32_in_a_bfloat16_model(router, options, network):
  # Catches logits or other learned inputs of a router in bfloat16, whose ties and rounding change
  # which expert is chosen.
  layer = make(dtype=jnp.bfloat16, gate_network=network).clone(
    router=functools.partial(ROUTERS[router].route, **options),
    learned=ROUTERS[router].learned,
    router_groups=2,
  )
  x = X.astype(jnp.bfloat16)
  variables = initialise(layer, 1.0)
  jaxpr = str(jax.make_jaxpr(lambda v, x: layer.apply(v, x, context()))(variables, x))
  assert re.search(r":f32\[2,6,4\] = dot_general", jaxpr) and not re.search(
    r":bf16\[2,6,4\]", jaxpr
  )
  assert set(re.findall(r":(\w+)\[[\d,]*\] = exp ", jaxpr)) == {"f32"}  # softmax and losses
  assert jax.eval_shape(layer.apply, variables, x, context())[0].dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_a_bfloat16_router_rounds_its_logits_and_nothing_else():
  # Catches a router_dtype that does not reach the product, that reaches the softmax, or that leaves
  # weights in bfloat16.
  layer = make(router_dtype="bfloat16")
  variables = initialise(layer, 1.0)
  jaxpr = str(jax.make_jaxpr(lambda v, x: layer.apply(v, x, context()))(variables, X))
  assert re.search(r":bf16\[2,6,4\] = dot_general", jaxpr)
  assert set(re.findall(r":(\w+)\[[\d,]*\] = exp ", jaxpr)) == {"f32"}
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

  def half(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)

  largest = np.abs(half(X) @ half(variables["params"]["router"])).max()
  logit_max = run(layer, variables, X, context())[1].metrics["logit_max"]
  assert logit_max.dtype == jnp.float32 and float(logit_max) == float(jnp.bfloat16(logit_max))
  assert float(logit_max) == pytest.approx(largest, rel=2**-8) and float(logit_max) != float(
    run(make(), variables, X, context())[1].metrics["logit_max"]
  )


def test_jitter_reaches_the_router_and_not_the_experts_and_only_in_training():
  # Catches experts that see jittered input (a published bug), and evaluation that is random.
  layer, clean = make(4, jitter=0.5, gate_norm="none"), make(4)
  variables = initialise(layer, 1.0)

  def train(m, seed):
    return run(m, variables, X, context(train=True), seed=seed)[0]

  assert float(jnp.abs(train(layer, 0) - train(layer, 1)).max()) > 1e-4
  np.testing.assert_array_equal(
    run(layer, variables, X, context())[0], run(clean, variables, X, context())[0]
  )
  # With a router of zeros, jitter changes no gate, so nothing at all may change.
  variables["params"]["router"] *= 0
  np.testing.assert_array_equal(train(layer, 0), train(clean, 1))


def test_eval_capacity_and_basis():
  # Catches a training capacity that is used at evaluation, and a basis that is not passed on.
  def rate(train, **kwargs):
    return float(run(make(2, **kwargs), variables, X, context(train=train))[1].metrics["drop_rate"])

  variables = initialise(make(2))
  assert rate(True, capacity_factor=0.5, eval_capacity_factor=4.0) > 0
  assert rate(False, capacity_factor=0.5, eval_capacity_factor=4.0) == 0
  assert rate(False, capacity_factor=0.5) == rate(True, capacity_factor=0.5)
  assert rate(True, capacity_factor=0.7, capacity_basis="assignments") < rate(
    True, capacity_factor=0.7
  )


def test_padding_changes_nothing():
  # Catches padding that takes slots, counts in a loss or a metric, or shifts the noise of real
  # tokens.
  layer = make(
    2, capacity_factor=1.0, losses=tiny.loss_options(*ALL_BUT_THRESHOLD, devices=2), group_size=L
  )
  variables = initialise(layer)
  y, aux = run(layer, variables, X, context())
  more = (
    jnp.concatenate([X, 7 + X]),
    context(jnp.repeat(jnp.asarray([1, 0]), B)[:, None] * jnp.ones((1, L), jnp.int32)),
  )
  y2, aux2 = run(layer, variables, *more)
  np.testing.assert_allclose(y2[:B], y, atol=1e-6)
  np.testing.assert_array_equal(y2[B:], 0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aux, aux2)


def test_shared_experts_are_added_once():
  # Catches shared experts that are gated or dispatched.
  shared = functools.partial(DenseFfn, d_ff=7, activation="gelu")
  layer, plain = make(2, shared=shared), make(2)
  variables = initialise(layer)
  alone = DenseFfn(d_ff=7, activation="gelu").apply(
    {"params": variables["params"]["shared"]}, X, context()
  )[0]
  np.testing.assert_allclose(
    run(layer, variables, X, context())[0],
    run(plain, variables, X, context())[0] + alone,
    atol=1e-5,
  )


def test_bias_moves_the_choice():
  # Catches a bias that does not reach the router.
  layer = make(1)
  variables = initialise(layer, 1.0)

  def load(bias):
    return run(layer, variables, X, context(), LayerRouting(bias))[1].metrics["load"]

  np.testing.assert_allclose(load(jnp.asarray([0.0, 0.0, 2.0, 0.0])), [0, 0, 1, 0])
  np.testing.assert_array_equal(load(jnp.zeros(E)), load(None))


def test_choices():
  # Token 0 has gates of 0.3 on expert 2 and 0.6 on expert 1, token 1 has no expert, and token 2 has
  # expert 0. Catches the first listed expert instead of the one with the largest gate, and a second
  # choice of a token that has one expert.
  plan = RoutingPlan(
    token=jnp.asarray([0, 0, 1, 2]),
    expert=jnp.asarray([2, 1, E, 0]),
    gate=jnp.asarray([0.3, 0.6, 0.0, 0.1]),
    num_experts=E,
  )
  assert choices(plan, 3, 2).tolist() == [[1, E, 0], [2, E, E]]


def test_group_size():
  # Catches a silent reshape across the wrong tokens.
  assert GroupOptions(16).tokens(4, 8) == 16 and GroupOptions(64).tokens(1, 8) == 8
  assert GroupOptions(group_rows=2).tokens(4, 8) == 16
  with pytest.raises(ConfigError, match="group_size"):
    GroupOptions(12).tokens(4, 8)


# The routers whose plans, learned inputs or losses differ most are tested always, and the others
# only by `make test-all`.
@pytest.mark.parametrize(
  "router",
  tiny.often(
    {"top_k", "hierarchical", "strictly_balanced", "noisy_top_k", "expert_choice", "base"}, ROUTERS
  ),
)
def test_every_router_reports_every_loss_and_metric(router):
  # Catches a router whose plan the layer's losses or metrics cannot read, and a learned input that
  # the layer forgets.
  names = tuple(LOSSES) if "threshold" in ROUTERS[router].learned else ALL_BUT_THRESHOLD
  options = {
    "device_limited": {"k": 2, "groups": 2, "kept_groups": 1},
    "sigmoid_bias": {"k": 2},
    "hierarchical": {"groups": 2},
  }.get(router, {})
  load = load_without_noise
  if ROUTERS[router].smooth_load:
    load = functools.partial(ROUTERS[router].smooth_load, groups=2, primary_k=2, k=2)
  losses = tiny.loss_options(*names, devices=2)
  layer = make(losses=losses, facts=RouterFacts(load=load), group_size=B * L).clone(
    router=functools.partial(ROUTERS[router].route, **options),
    learned=ROUTERS[router].learned,
    router_groups=2,
  )
  y, aux = run(layer, initialise(layer), X, context(PADDED, train=True, return_routing=True))
  assert set(aux.losses) == set(names) and all(bool(jnp.isfinite(v)) for v in aux.losses.values())
  assert float(aux.metrics["load"].sum()) == pytest.approx(1.0) and aux.metrics[
    "top1_expert"
  ].shape == (B, L)
  assert bool(jnp.all(y[0, 4:] == 0))


def test_routed_scale():
  # Catches a factor that is not applied.
  variables = initialise(make(2))
  np.testing.assert_allclose(
    run(make(2, routed_scale=2.5), variables, X, context())[0],
    2.5 * run(make(2), variables, X, context())[0],
    rtol=1e-5,
  )


def test_shared_gate():
  # The output is y = routed + sigmoid(x w) * shared(x), with one gate per token (Qwen1.5-MoE).
  # Catches a gate on the routed part.
  shared = functools.partial(DenseFfn, d_ff=7, activation="gelu")
  layer, plain = make(2, shared=shared, shared_gate=True), make(2)
  variables = initialise(layer)
  p = variables["params"]
  alone = DenseFfn(d_ff=7, activation="gelu").apply({"params": p["shared"]}, X, context())[0]
  expected = run(plain, variables, X, context())[0] + jax.nn.sigmoid(X @ p["shared_gate"]) * alone
  np.testing.assert_allclose(run(layer, variables, X, context())[0], expected, atol=1e-5)


def test_jitter_on_logits():
  # Catches logits that are not jittered, and evaluation that is random.
  layer = make(4, jitter=0.5, jitter_on="logits")
  variables = initialise(layer, 1.0)

  def train(seed):
    return run(layer, variables, X, context(train=True), seed=seed)[0]

  assert float(jnp.abs(train(0) - train(1)).max()) > 1e-5
  np.testing.assert_array_equal(
    run(layer, variables, X, context())[0], run(make(4), variables, X, context())[0]
  )


def test_a_stored_plan_is_followed():
  # Catches a stored plan that is ignored, and gates that are recomputed where they should be the
  # stored ones.
  layer = make(2)
  first, second = initialise(layer), initialise(layer, -30.0)  # opposite preferences
  _, aux = run(layer, first, X, context(return_routing=True))
  followed, aux2 = run(
    layer, second, X, context(return_routing=True), LayerRouting(stored=aux.metrics["plan"])
  )
  jax.tree.map(np.testing.assert_array_equal, aux2.metrics["plan"], aux.metrics["plan"])
  # The experts of both sets of variables are the same; only the routers differ.
  np.testing.assert_allclose(followed, run(layer, first, X, context())[0], atol=1e-5)
  fresh = run(
    make(2, replay_gate="softmax"), second, X, context(), LayerRouting(stored=aux.metrics["plan"])
  )[0]
  assert float(jnp.abs(fresh - followed).max()) > 1e-3


def test_router_norm_is_before_the_router_only():
  # Catches a norm that the experts see, too, one without its learned scale, and one after the
  # router's matrix.
  layer = make(1, router_norm="rms")
  variables = initialise(layer)
  y, aux = run(layer, variables, X, context(return_routing=True))
  w = jax.tree.map(np.asarray, variables["params"])
  x = np.asarray(X)
  normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * w["router_norm"]["scale"]
  probabilities = np.asarray(jax.nn.softmax(normed @ w["router"], axis=-1))
  np.testing.assert_allclose(aux.metrics["probabilities"], probabilities, atol=1e-5)
  expert = probabilities.argmax(axis=-1)
  for b, t in ((0, 0), (1, 5)):
    e = expert[b, t]
    expected = np.asarray(jax.nn.gelu(x[b, t] @ w["up"][e])) @ w["down"][e]
    np.testing.assert_allclose(y[b, t], probabilities[b, t, e] * expected, atol=1e-5)


@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("dispatcher", ["einsum", "grouped"])
@pytest.mark.parametrize("k", [1, 2])
def test_gates_on_inputs(k, dispatcher, factor):
  # The output is the sum of expert(gate * x), and that of its gradients (Llama 4). Catches gates
  # that multiply outputs, or both, and another order of what a capacity drops.
  layer = make(k, dispatcher, capacity_factor=factor, gate_on="input", routed_scale=1.5)
  variables = initialise(layer)
  outputs = make(k, dispatcher, capacity_factor=factor, routed_scale=1.5)
  plan = run(outputs, variables, X, context(PADDED, return_routing=True))[1].metrics["plan"]
  capacity = None if factor is None else max(1, round(factor * L / E))
  one = [reference.assignments(jax.tree.map(lambda leaf, b=b: leaf[b], plan)) for b in range(B)]
  kept = [reference.drop_overflow(each, E, capacity) for each in one]

  def expected(params):
    # Each kept pair of token and expert has the gate of the plan, which follows the router.
    probs = jax.nn.softmax(X @ params["router"], axis=-1)
    y = jnp.zeros_like(X)
    for b in range(B):
      for t, e, _ in kept[b]:
        row = 1.5 * probs[b, t, e] * X[b, t]
        y = y.at[b, t].add(jax.nn.gelu(row @ params["up"][e]) @ params["down"][e])
    return y

  def actual(params):
    return layer.apply({"params": params}, X, context(PADDED))[0]

  cotangent = jax.random.normal(jax.random.key(5), X.shape)

  def value_and_slopes(function):
    y, pull = jax.vjp(function, variables["params"])
    return y, pull(cotangent)

  ours, theirs = (tiny.quick_jit(lambda f=f: value_and_slopes(f))() for f in (actual, expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, theirs)


def test_what_published_routers_learn_gets_a_gradient():
  # Catches a parameter that is made and not used, or not made when a layer begins.
  layer = make(
    2, gate_norm="top_k", router_norm="rms", router_bias=True, logit_softcap=5.0, expert_scale=True
  )
  variables = initialise(layer, 1.0)

  def loss(v):
    return jnp.sum(jnp.sin(layer.apply(v, X, context())[0]))

  slopes = tiny.quick_jit(jax.grad(loss))(variables)["params"]
  for name in ("router_bias", "router_gate_scale", "router_norm"):
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes[name])) > 1e-3, name


@pytest.mark.parametrize("dispatcher", ["einsum", "grouped"])
def test_experts_in_a_narrower_space(dispatcher):
  # The layer is that of three-wide experts between two matrices. Catches a router or a shared
  # expert that sees the narrow tokens, gates that are applied twice, and matrices that are swapped.
  shared = functools.partial(DenseFfn, d_ff=3, activation="gelu")
  layer = make(latent_width=3, dispatcher=dispatcher, shared=shared)
  variables = initialise(layer)
  w = variables["params"]
  assert w["up"].shape == (E, 3, 5) and w["down"].shape == (E, 5, 3)
  assert w["latent_down"].shape == (D, 3) and w["latent_up"].shape == (3, D)
  y, _ = run(layer, variables, X, context())
  probs = jax.nn.softmax(X @ w["router"], axis=-1)
  gates, chosen = jax.lax.top_k(probs, 2)
  narrow = X @ w["latent_down"]
  every = jnp.einsum(
    "blef,efw->blew", jax.nn.gelu(jnp.einsum("blw,ewf->blef", narrow, w["up"])), w["down"]
  )
  picked = jnp.take_along_axis(every, chosen[..., None], axis=2)
  expected = jnp.sum(gates[..., None] * picked, axis=2) @ w["latent_up"]
  expected += jax.nn.gelu(X @ w["shared"]["up"]) @ w["shared"]["down"]
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  rows = X.astype(jnp.bfloat16)
  alone = layer.clone(shared=None)
  assert jax.eval_shape(lambda v: alone.apply(v, rows, context())[0], variables).dtype == rows.dtype


def test_the_output_of_narrow_experts_begins_small():
  # Catches a scale of the residual stream on the experts inside, or on both.
  plain, scaled = (
    nn.unbox(make(latent_width=3, output_scale=s).init(jax.random.key(1), X, context()))["params"]
    for s in (1.0, 0.25)
  )
  np.testing.assert_allclose(scaled["latent_up"], 0.25 * plain["latent_up"], rtol=1e-6)
  np.testing.assert_array_equal(scaled["down"], plain["down"])
