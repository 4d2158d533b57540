"""Tests zero-computation experts against examples by hand and an oracle in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from moe_jax import sharding
from moe_jax.dispatch import DISPATCHERS
from moe_jax.layers import (
  LayerContext,
  LayerRouting,
  LossOptions,
  Microbatch,
  MoeLayer,
  RouterFacts,
  ZeroOptions,
)
from moe_jax.layers import zero_experts as zero
from moe_jax.routing import ROUTERS, RoutingPlan, balancing
from moe_jax.routing.metrics import combine, finish
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.numerics

B, L, D, E = 2, 6, 8, 4
Z = ZeroOptions(zero_experts=1, copy_experts=1, constant_experts=2)
N = E + 4
X = jax.random.normal(jax.random.key(0), (B, L, D))
PADDED = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 2]])


def context(segments=PADDED, **kwargs):
  return LayerContext(jnp.zeros_like(segments), segments, jnp.zeros_like(segments), **kwargs)


def make(options=Z, k=3, dispatcher="scatter", **kwargs):
  return MoeLayer(
    num_experts=E,
    d_ff=5,
    activation="gelu",
    router=functools.partial(top_k, k=k, gate_norm="none"),
    dispatcher=DISPATCHERS[dispatcher],
    platform="cpu",
    zero=options,
    **tiny.moe_fields(**kwargs),
  )


def initialise(layer):
  """Returns random variables of a layer whose router is confident."""
  shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(1), X, context()))
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), shapes)


def run(layer, variables, x=X, where=None, routing=None):
  where = where or context()
  rngs = {"router": jax.random.key(0)} if where.train else {}
  return tiny.quick_jit(layer.apply)(variables, x, where, routing, rngs=rngs)


def softmax(logits):
  shifted = np.exp(logits - logits.max(-1, keepdims=True))
  return shifted / shifted.sum(-1, keepdims=True)


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def oracle(weights, x, k, capacity=None, scale=1.0):
  """Returns the layer's output, token by token, in float64, and how many assignments found no slot.

  Assignments get slots in order of choice, then of position, and only those to FFNs need one.
  """
  w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
  y, x, dropped = np.zeros(x.shape), np.asarray(x, np.float64), 0
  for b in range(len(x)):
    taken = np.zeros(E, int)
    probabilities = softmax(x[b] @ w["router"])
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    for choice in range(k):
      for t in range(L):
        if PADDED[b, t] == 0:
          continue
        e, token = order[t, choice], x[b, t]
        gate = scale * probabilities[t, e]
        if e < E:
          taken[e] += 1
          if capacity is None or taken[e] <= capacity:
            y[b, t] += gate * (gelu(token @ w["up"][e]) @ w["down"][e])
          else:
            dropped += 1
        elif e == E + 1:
          y[b, t] += gate * token
        elif e > E + 1:
          j = e - E - 2
          a = softmax(token @ w["constant_mix"][:, 2 * j : 2 * j + 2])
          y[b, t] += gate * (a[0] * token + a[1] * w["constant_vectors"][j])
  return y, dropped


def test_one_token_by_hand():
  # One token x = (1, -2) with gates 0.1 on an FFN, 0.2 on the zero, 0.3 on the copy and 0.4 on the
  # constant expert, whose mix is softmax(0, ln 3) = (1/4, 3/4) and whose vector is (4, 8):
  # 0.3 x + 0.4 (x/4 + 3/4 v) = 0.4 x + 0.3 v = (0.4, -0.8) + (1.2, 2.4) = (1.6, 1.6).
  # Catches an expert with another's gate, a mix in the wrong order, and output of the FFN's gate.
  plan = RoutingPlan(
    token=jnp.asarray([[0, 0, 0, 0]]),
    expert=jnp.asarray([[0, 1, 2, 3]]),
    gate=jnp.asarray([[0.1, 0.2, 0.3, 0.4]]),
    num_experts=4,
  )
  weights = zero.Constants(
    mix=jnp.asarray([[0.0, jnp.log(3.0)], [0.0, 0.0]]), vectors=jnp.asarray([[4.0, 8.0]])
  )
  y = zero.outputs(plan, jnp.asarray([[[1.0, -2.0]]]), ZeroOptions(1, 1, 1), weights)
  np.testing.assert_allclose(y, [[[1.6, 1.6]]], rtol=1e-6)
  busy = zero.ffn_part(plan, 1)
  assert busy.expert.tolist() == [[0, 1, 1, 1]] and busy.num_experts == 1
  np.testing.assert_allclose(busy.gate, [[0.1, 0, 0, 0]])
  assert int(zero.sums(plan, 1)["free"]) == 3


def test_what_has_no_ffn_is_never_dropped():
  # Of the assignments to experts 0, 2 (without an FFN) and 0 again, capacity dropped the last one;
  # the fourth names no expert. Catches a zero-computation expert that counts as dropped, and a
  # padded assignment that becomes one.
  plan = RoutingPlan(
    token=jnp.asarray([0, 1, 1, 2]),
    expert=jnp.asarray([0, 2, 0, 3]),
    gate=jnp.asarray([0.5, 0.6, 0.7, 0.0]),
    num_experts=3,
  )
  kept = zero.ffn_part(plan, 2).replace(expert=jnp.asarray([0, 2, 2, 2]))
  found = zero.with_kept(plan, kept)
  assert found.expert.tolist() == [0, 2, 3, 3] and found.num_experts == 3
  np.testing.assert_allclose(found.gate, [0.5, 0.6, 0, 0])


@pytest.mark.parametrize("capacity", [None, 1])
@pytest.mark.parametrize("dispatcher", ["scatter", "grouped"])
def test_the_layer_is_the_oracle(dispatcher, capacity):
  # Catches zero-computation experts that take slots of FFNs or drop tokens, padding that they
  # serve, a scale of gates that they ignore, kinds in another order, and a metric of drops that
  # counts what has no slots.
  layer = make(dispatcher=dispatcher, capacity_slots=capacity or 0, routed_scale=2.0)
  variables = initialise(layer)
  y, aux = run(layer, variables)
  expected, dropped = oracle(variables["params"], X, 3, capacity, scale=2.0)
  np.testing.assert_allclose(y, expected, atol=1e-4)
  assert not np.any(np.asarray(y)[0, 4:])
  assert (dropped > 0) == bool(capacity)
  # Each of the 10 real tokens has three choices.
  assert float(aux.metrics["drop_rate"]) == pytest.approx(dropped / 30)


def test_gradients_are_those_of_the_oracle():
  # Compares directional derivatives with differences of the float64 oracle. Catches gates, mixes or
  # vectors without gradient, and a gradient to the token that misses its own copy.
  layer, rng = make(), np.random.default_rng(4)
  variables = initialise(layer)
  target = rng.normal(size=X.shape)

  def total(params, x):
    return jnp.sum(layer.apply({"params": params}, x, context())[0] * target)

  grads = tiny.quick_jit(jax.grad(total, argnums=(0, 1)))(variables["params"], X)
  for name in (*variables["params"], "x"):
    weights = {key: np.asarray(v, np.float64) for key, v in variables["params"].items()}
    x = np.asarray(X, np.float64)
    gradient = grads[1] if name == "x" else grads[0][name]
    direction, values = rng.normal(size=gradient.shape), []
    for sign in (1, -1):
      moved = sign * 1e-6 * direction
      where = weights if name == "x" else weights | {name: weights[name] + moved}
      values.append(np.sum(oracle(where, x + moved if name == "x" else x, 3)[0] * target))
    expected = (values[0] - values[1]) / 2e-6
    assert float(np.sum(gradient * direction)) == pytest.approx(expected, rel=1e-3, abs=1e-4), name
    assert abs(expected) > 1e-3, name


@pytest.mark.parametrize("scale", [0.75, 1.0])
def test_tau_weighs_the_balance_loss(scale):
  # (E + Z) sum_i eta_i f_i P_i with f and P of real tokens. Catches tau on f or P of the FFNs, E in
  # place of E + Z, and a loss over FFNs only.
  losses = LossOptions(balance_loss=1.0, balance_counts="all", z_loss=0.0)
  layer = make(dataclasses.replace(Z, zero_tau=scale), k=2, losses=losses, group_size=B * L)
  variables = initialise(layer)
  found = run(layer, variables)[1].losses["balance"]
  real = np.asarray(X).reshape(-1, D)[np.asarray(PADDED).ravel() > 0]
  p = softmax(real @ np.asarray(variables["params"]["router"]))
  chosen = np.argsort(-p, axis=-1)[:, :2].ravel()
  f = np.bincount(chosen, minlength=N) / len(chosen)
  eta = np.where(np.arange(N) < E, 1.0, scale)
  assert float(found) == pytest.approx(N * np.sum(eta * f * p.mean(0)), rel=1e-5)


def test_counts_of_zero_change_nothing():
  # Catches a parameter, an operation or a metric of layers that have no such experts.
  plain, none = make(ZeroOptions()), make(ZeroOptions(zero_tau=0.5))
  variables = initialise(plain)
  assert set(variables["params"]) == {"router", "up", "down"}
  programs = [str(jax.make_jaxpr(m.apply)(variables, X, context())) for m in (plain, none)]
  assert programs[0] == programs[1]
  metrics = run(none, variables)[1].metrics
  assert not {"zero_share", "ffn_experts_a_token"} & set(metrics)


def test_metrics_add_up_over_microbatches():
  # Catches means of microbatches in place of those of the batch, and padding that counts.
  layer = make(k=2)
  variables = initialise(layer)
  whole = run(layer, variables)[1]
  parts = []
  for row in range(B):
    micro = Microbatch(jnp.int32(row), jnp.float32(10), count=B)
    part = run(layer, variables, X[row : row + 1], context(PADDED[row : row + 1], micro=micro))[1]
    parts.append(part.sums)
  found = finish(combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)))
  real = np.asarray(X).reshape(-1, D)[np.asarray(PADDED).ravel() > 0]
  chosen = np.argsort(-(real @ np.asarray(variables["params"]["router"])), axis=-1)[:, :2]
  for metrics in (found, whole.metrics):
    assert float(metrics["zero_share"]) == pytest.approx(np.mean(chosen >= E))
    assert float(metrics["ffn_experts_a_token"]) == pytest.approx(np.sum(chosen < E) / len(real))
    assert float(metrics["experts_a_token"]) == pytest.approx(2)
  assert 0 < float(found["zero_share"]) < 1 and found["load"].shape == (N,)


def test_two_devices_give_the_same():
  # Catches a layer whose result depends on the mesh, forward or backward.
  layer = make(dispatcher="grouped")
  variables = initialise(layer)

  def total(params, x):
    y, aux = layer.apply({"params": params}, x, context())
    return jnp.sum(jnp.sin(y)), (y, aux.metrics)

  f = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  alone = f(variables["params"], X)
  with jax.set_mesh(sharding.make_mesh({"expert": 2}, jax.devices()[:2])):
    together = f(variables["params"], X)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), together, alone)


def flops(options):
  """Returns the FLOPs of the compiled forward pass of a layer of some size, with two choices."""
  layer = make(options, k=2, capacity_factor=1.0).clone(d_ff=256)
  x = jnp.zeros((1, 128, 64))
  where = context(jnp.ones((1, 128), jnp.int32))
  variables = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x, where))
  compiled = jax.jit(lambda v, x: layer.apply(v, x, where)[0]).lower(variables, x).compile()
  cost = compiled.cost_analysis()
  return (cost[0] if isinstance(cost, list) else cost)["flops"]


def test_flops_grow_by_the_router_only():
  # 8 copy experts beside 4 FFNs add 8 columns of the router, 2 * 128 * 64 * 8 FLOPs, and a few for
  # each token's softmax, choice and sum. The slots of one more FFN would add 2 * 32 * 2 * 64 * 256.
  # Catches slots, rows or FFNs for experts that have none.
  router, ffn = 2 * 128 * 64 * 8, 2 * 32 * 2 * 64 * 256
  added = flops(ZeroOptions(copy_experts=8)) - flops(ZeroOptions())
  assert router <= added < router + 0.15 * ffn


def test_bias_and_stored_plan_name_experts_without_an_ffn():
  # A bias sends all tokens to the copy expert, so that y = p x; the stored plan does, too, without
  # the bias. Catches a bias or a plan that is only for FFNs.
  layer = make(k=1)
  variables = initialise(layer)
  bias = jnp.zeros(N).at[E + 1].set(2.0)
  where = context(return_routing=True)
  y, aux = run(layer, variables, where=where, routing=LayerRouting(bias))
  p = softmax(np.asarray(X @ variables["params"]["router"]))[..., E + 1 : E + 2]
  expected = p * np.asarray(X) * (np.asarray(PADDED) > 0)[..., None]
  np.testing.assert_allclose(y, expected, atol=1e-5)
  assert float(aux.metrics["zero_share"]) == 1 and float(aux.metrics["dropped_tokens"]) == 0
  followed = run(layer, variables, routing=LayerRouting(stored=aux.metrics["plan"]))[0]
  np.testing.assert_allclose(followed, expected, atol=1e-5)


def test_loss_free_balancing_moves_all_biases():
  # Catches a rule that observes E in place of E + Z experts.
  rule = balancing.BalancingOptions(rule="quantile")
  observe = functools.partial(balancing.observe, scores=ROUTERS["top_k"].biased, k=2, options=rule)
  layer = make(k=2).clone(observe=observe)
  where = context(train=True)
  aux = run(layer, initialise(layer), where=where, routing=LayerRouting(jnp.zeros(N)))[1]
  assert aux.sums[balancing.TARGET].shape == (N,)


def test_tokens_that_are_routed_by_themselves_get_the_same():
  # Catches a layer for decoding (`few_tokens`) that forgets experts without an FFN.
  layer = make()
  variables = initialise(layer)
  y = run(layer, variables)[0]
  np.testing.assert_allclose(run(layer, variables, where=context(dropless=True))[0], y, atol=1e-4)


# Those whose plans or learned inputs differ most are tested always.
CHOOSERS = sorted(
  name
  for name, router in ROUTERS.items()
  if not router.competes and "capacity_factor" not in router.options
)


@pytest.mark.parametrize(
  "router", tiny.often({"hierarchical", "noisy_top_k", "relu", "scored_top_k"}, CHOOSERS)
)
def test_every_router_by_which_tokens_choose(router):
  # Catches a router whose plan the layer cannot split, and a learned input that has E columns.
  options = {
    "device_limited": {"k": 2, "groups": 2, "kept_groups": 1},
    "sigmoid_bias": {"k": 2},
    "hierarchical": {"groups": 2},
  }.get(router, {})
  layer = make(jitter=0.1, losses=tiny.loss_options("balance", "z"), group_size=B * L).clone(
    router=functools.partial(ROUTERS[router].route, **options),
    learned=ROUTERS[router].learned,
    router_groups=2,
    facts=RouterFacts(),
  )
  x = jnp.where(PADDED[..., None] > 0, X, 1e3)
  where = dataclasses.replace(context(train=True, return_routing=True), token_ids=7 * PADDED)
  y, aux = run(layer, initialise(layer), x, where)
  assert bool(jnp.all(jnp.isfinite(y))) and not np.any(np.asarray(y)[0, 4:])
  plan, metrics = aux.metrics["plan"], aux.metrics
  free = int(np.sum((np.asarray(plan.expert) >= E) & (np.asarray(plan.expert) < N)))
  total = int(np.sum(np.asarray(plan.expert) < N))
  assert plan.num_experts == N
  assert float(metrics["zero_share"]) == pytest.approx(free / max(total, 1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(dtype):
  # Catches a result in float32, which would double the memory, and gates in bfloat16.
  layer = make(dtype=dtype)
  variables = initialise(layer)
  y = jax.eval_shape(layer.apply, variables, X.astype(dtype), context())[0]
  assert y.dtype == dtype
  found = run(layer, variables, X.astype(dtype))[0].astype(jnp.float32)
  np.testing.assert_allclose(found, run(make(), variables)[0], atol=0.15)
