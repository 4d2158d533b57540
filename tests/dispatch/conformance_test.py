"""The table that every router and dispatcher must pass: values and gradients, with and without overflow, under jit.

The oracle's loops give the values; `_dense` (every expert on every token, weighted by the oracle's 0/1 masks) gives the
gradients and is itself held against the oracle. A new router takes one line in CASES, a new dispatcher none.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from moe_jax.dispatch import DISPATCHERS, drop_overflow, expert_capacity
from moe_jax.experts import Experts
from moe_jax.routing import LOOKS_AHEAD, ROUTERS, RoutingContext, group_axes

pytestmark = pytest.mark.conformance

G, S, E, D, F = 2, 16, 4, 6, 8
PADDING = np.arange(S) < np.array([[S], [S - 3]])  # the second group ends in three padded tokens

CASES = [("top_k", {"k": k, "gate_norm": norm, "priority": priority})
         for k, norm in [(1, "none"), (2, "top_k"), (4, "none")] for priority in ("choice", "token", "gate")]
CASES += [("top_k", {"k": 1, "gate_norm": "top_k"}), ("expert_choice", {"capacity_factor": 2.0})]
TOP_2 = {"k": 2, "gate_norm": "top_k", "priority": "choice"}
_label = lambda v: "-".join(str(o) for o in v.values()) if isinstance(v, dict) else None
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=_label)
each_dispatcher = pytest.mark.parametrize("dispatcher", DISPATCHERS)
each_capacity = pytest.mark.parametrize("capacity", [2, S, None], ids=["overflow", "no_overflow", "dropless"])


def test_every_router_is_in_the_table():
  # Catches: a new router without a line in CASES.
  assert {name for name, _ in CASES} == set(ROUTERS) == set(LOOKS_AHEAD) == set(reference.ROUTERS)


@functools.cache
def _experts(seed=0, experts=E, width=D, hidden=F):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)
  return Experts(up=normal(experts, width, hidden), gate=normal(experts, width, hidden),
                 down=normal(experts, hidden, width), activation="swiglu")


@functools.cache
def _inputs(seed=0):
  """(logits, x, cotangent of y): three experts far more popular than the fourth, so that capacity 2 overflows."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(G, S, E)) * 2 + np.array([2.0, 0.5, 0.5, -1.0])
  return tuple(a.astype(np.float32) for a in (logits, rng.normal(size=(G, S, D)), rng.normal(size=(G, S, D))))


@functools.cache
def _router(name, items):
  """The router over groups, jitted, with its vector-Jacobian product: (logits, valid, d_gate) -> (plan, d_logits)."""
  def route(logits, valid, d_gate):
    context = RoutingContext(valid=valid)
    one = lambda logits, context: ROUTERS[name](logits, context, **dict(items))
    plan = jax.vmap(one, in_axes=(0, group_axes(context)))(logits, context)
    if d_gate is None:
      return plan
    gates = lambda logits: jax.vmap(one, in_axes=(0, group_axes(context)))(logits, context).gate
    return jax.vjp(gates, logits)[1](d_gate)[0]
  return jax.jit(route)


def _route(name, options, logits, valid=PADDING, d_gate=None):
  return _router(name, tuple(options.items()))(logits, jnp.asarray(valid), d_gate)


def _same_size(plan, size=S * E):
  """The plan with assignments of nobody appended up to `size`, so that one compilation serves all routers."""
  fill = lambda a, value: np.pad(a, ((0, 0), (0, size - a.shape[1])), constant_values=value)
  return plan.replace(token=fill(plan.token, 0), expert=fill(plan.expert, plan.num_experts), gate=fill(plan.gate, 0))


@functools.partial(jax.jit, static_argnums=1)
def _drop(plan, capacity):
  return jax.vmap(lambda p: drop_overflow(p, capacity))(plan)


def _kept(plan, capacity):
  """Of each group: the assignments that `drop_overflow` leaves."""
  dropped = jax.device_get(_drop(plan, capacity))
  return [reference.assignments(jax.tree.map(lambda a, g=g: a[g], dropped)) for g in range(plan.token.shape[0])]


@functools.cache
def _dispatch(name):
  """The dispatcher with all its gradients, jitted: (plan, x, experts, d_y, capacity) -> (y, d_gate, d_x, d_experts)."""
  def run(plan, x, experts, d_y, capacity):
    f = lambda gate, x, experts: DISPATCHERS[name](plan.replace(gate=gate), x, experts, capacity, "cpu")
    y, pull = jax.vjp(f, plan.gate, x, experts)
    return y, *pull(d_y)
  return jax.jit(run, static_argnames="capacity")


@functools.cache
def _forward(name):
  return jax.jit(lambda plan, x, experts, capacity: DISPATCHERS[name](plan, x, experts, capacity, "cpu"),
                 static_argnums=3)


def _oracle(name, options, logits, valid, capacity):
  """Of each group: the oracle's plan and what capacity leaves of it."""
  plans = [reference.ROUTERS[name](l, **options, valid=v) for l, v in zip(logits, valid, strict=True)]
  return plans, [reference.drop_overflow(p, logits.shape[-1], capacity) for p in plans]


def _mask(plans, shape):
  mask = np.zeros(shape, np.float32)
  for g, plan in enumerate(plans):
    for token, expert, _ in plan:
      assert mask[g, token, expert] == 0
      mask[g, token, expert] = 1
  return mask


@functools.partial(jax.jit, static_argnames="renormalised")
def _dense(logits, x, weights, chosen, kept, d_y, renormalised):
  """Every expert on every token: value and gradients with respect to logits, x and weights."""
  def f(logits, x, w):
    probs = jax.nn.softmax(logits)
    gates = probs * kept / (jnp.sum(probs * chosen, -1, keepdims=True) + (1 - jnp.any(chosen, -1, keepdims=True))
                            if renormalised else 1.0)
    g = jnp.einsum("gsd,edf->gsef", x, w["gate"])
    hidden = g * jax.nn.sigmoid(g) * jnp.einsum("gsd,edf->gsef", x, w["up"])
    return jnp.einsum("gse,gsef,efd->gsd", gates, hidden, w["down"])
  y, pull = jax.vjp(f, logits, x, weights)
  return y, *pull(d_y)


def _close(actual, expected, tolerance=2e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
    np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance), actual, expected)


@each_capacity
@each_dispatcher
@each_case
def test_values_and_gradients(name, options, dispatcher, capacity):
  # Catches: another order under overflow, an off-by-one slot, a dropped gate's gradient, padding that takes a slot,
  # gates renormalised after the drop, weight gradients of the wrong expert.
  logits, x, d_y = _inputs()
  experts = _experts()
  plan = _route(name, options, logits)
  y, d_gate, d_x, d_experts = _dispatch(dispatcher)(_same_size(plan), x, experts, d_y, capacity)
  d_logits = _route(name, options, logits, d_gate=d_gate[:, :plan.gate.shape[1]])

  plans, kept = _oracle(name, options, logits, PADDING, capacity)
  assert any(len(k) < len(p) for k, p in zip(kept, plans, strict=True)) == (capacity == 2)  # the case is what it says
  expected = np.stack([reference.moe(k, rows, experts.weights) for k, rows in zip(kept, x, strict=True)])
  _close(y, expected)
  dense_y, *gradients = _dense(logits, x, experts.weights, _mask(plans, logits.shape), _mask(kept, logits.shape), d_y,
                               options.get("gate_norm") == "top_k")
  _close(dense_y, expected)
  _close([d_logits, d_x, d_experts.weights], gradients)


@pytest.mark.parametrize("capacity", [2, None])
@each_case
def test_plan_invariants_and_drop(name, options, capacity):
  # The four invariants of RoutingPlan. Catches: gates of nobody, pairs twice (through _mask), drops out of order.
  logits, _, _ = _inputs()
  plan = _route(name, options, logits)
  token, expert, gate = map(np.asarray, (plan.token, plan.expert, plan.gate))
  assert gate.dtype == np.float32 and plan.num_experts == E
  assert token.min() >= 0 and token.max() < S and expert.min() >= 0 and expert.max() <= E
  assert np.all(gate[expert == E] == 0) and np.all((gate >= 0) & (gate <= 1 + 1e-6))
  plans, kept = _oracle(name, options, logits, PADDING, capacity)
  dropped = _drop(plan, capacity)
  for served, expecteds in ((_kept(plan, None), plans), (_kept(plan, capacity), kept)):
    for actual, expected in zip(served, expecteds, strict=True):
      assert [a[:2] for a in actual] == [e[:2] for e in expected]
      _close([a[2] for a in actual], [e[2] for e in expected])
  assert np.all(np.asarray(dropped.gate)[np.asarray(dropped.expert) == E] == 0)


@each_dispatcher
def test_jit_equals_no_jit(dispatcher):
  # Catches: a Python value that a trace froze.
  logits, x, d_y = _inputs()
  plan = _route("top_k", TOP_2, logits)
  eager = DISPATCHERS[dispatcher](plan, jnp.asarray(x), _experts(), 2, "cpu")
  _close(eager, _dispatch(dispatcher)(_same_size(plan), x, _experts(), d_y, 2)[0])


@each_dispatcher
def test_new_values_do_not_recompile(dispatcher):
  # Catches: shapes that depend on the routing (group sizes as Python numbers), weak types, a plan with static arrays.
  run, sizes = _dispatch(dispatcher), []
  for seed in (0, 1):
    logits, x, d_y = _inputs(seed)
    run(_same_size(_route("top_k", TOP_2, logits)), x, _experts(seed), d_y, 2)
    sizes.append(run._cache_size())
  assert sizes[0] == sizes[1]


@each_dispatcher
def test_permuted_tokens_give_permuted_results(dispatcher):
  # Dropless, only the set of tokens matters. Catches: position-dependent dispatch, an unsort by the wrong map.
  logits, x, d_y = _inputs()
  order = np.random.default_rng(0).permutation(S)
  for name, options in (("top_k", TOP_2), ("expert_choice", {"capacity_factor": 2.0})):
    run = lambda l, x, valid, name=name, options=options: _dispatch(dispatcher)(
      _same_size(_route(name, options, l, valid)), x, _experts(), d_y, None)[0]
    _close(run(logits[:, order], x[:, order], PADDING[:, order]), run(logits, x, PADDING)[:, order])


@each_dispatcher
@pytest.mark.parametrize(("name", "short", "long"), [
  ("top_k", TOP_2 | {"priority": "gate"}, TOP_2 | {"priority": "gate"}),
  ("expert_choice", {"capacity_factor": 2.0}, {"capacity_factor": 2.0 * S / (S + 4)})])  # the same 8 slots
def test_appended_padding_changes_nothing(name, short, long, dispatcher):
  # Catches: padding that takes slots (zero rows all tie for expert 0) or wins a place by its gate.
  logits, x, d_y = _inputs()
  more = lambda a: np.concatenate([a, np.zeros((G, 4, a.shape[-1]), np.float32)], axis=1)
  valid = np.concatenate([PADDING, np.zeros((G, 4), bool)], axis=1)
  alone = _dispatch(dispatcher)(_same_size(_route(name, short, logits)), x, _experts(), d_y, 2)[0]
  padded = _forward(dispatcher)(_same_size(_route(name, long, more(logits), valid)), more(x), _experts(), 2)
  _close(padded[:, :S], alone)
  assert not np.any(padded[:, S:])


@each_dispatcher
def test_padded_rows_have_no_influence(dispatcher):
  # Catches: content of a padded row that reaches a real one, or a result other than 0 for padding.
  logits, x, d_y = _inputs()
  plan = _route("top_k", TOP_2, logits)
  run = lambda x: np.asarray(_dispatch(dispatcher)(_same_size(plan), x, _experts(), d_y, 2)[0])
  clean, dirty = run(x), run(np.where(PADDING[..., None], x, np.float32(1e6)))
  np.testing.assert_array_equal(clean, dirty)
  assert not np.any(clean[~PADDING])


# At K = 1 the order of choices plays no part; K = 2 in choice-major order is the next test.
@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[1].get("k", 1) == 1] + [
  ("top_k", TOP_2 | {"priority": "token"}), ("top_k", TOP_2 | {"priority": "gate"})], ids=_label)
def test_causality_probe(name, options):
  # Changes the last tokens and looks at what earlier ones get, under overflow. Catches: a router that sees the future
  # and does not say so in LOOKS_AHEAD, and one that claims to and does not.
  logits, _, _ = _inputs()
  cut, valid = S // 2, np.ones((G, S), bool)
  served = lambda l: _mask(_kept(_route(name, options, l, valid), 2), logits.shape)[:, :cut]
  future = [np.concatenate([logits[:, :cut], _inputs(seed)[0][:, cut:]], axis=1) for seed in range(1, 9)]
  leaks = any(np.any(served(l) != served(logits)) for l in future)
  assert leaks == LOOKS_AHEAD[name](**options)


@pytest.mark.parametrize(("priority", "second_of_first"), [("choice", False), ("token", True)])
def test_choice_major_order_lets_a_first_choice_displace_an_earlier_second_choice(priority, second_of_first):
  # Token 0 wants experts 0 then 1, token 1 wants 1 then 0; one slot each. Choice-major (GShard, GLaM): token 1's first
  # choice beats token 0's second, though token 0 comes first. Token-major: token 0 gets both. First choices never move.
  logits = np.array([[[2.0, 1.0], [1.0, 2.0]]], np.float32)
  plan = _route("top_k", {"k": 2, "priority": priority}, logits, np.ones((1, 2), bool))
  pairs = {(t, e) for t, e, _ in _kept(plan, 1)[0]}
  assert (0, 0) in pairs and ((0, 1) in pairs) == second_of_first and ((1, 1) in pairs) != second_of_first
  both = {(t, e) for t, e, _ in _kept(plan, 2)[0]}
  assert both == {(0, 0), (0, 1), (1, 0), (1, 1)}  # without overflow there is nothing to displace


@each_dispatcher
@pytest.mark.parametrize(("tokens", "experts", "k", "capacity"), [
  (1, 4, 2, None), (5, 1, 1, 2), (3, 3, 3, 1)], ids=["S=1", "E=1", "K=E"])
def test_degenerate_sizes_with_ties(tokens, experts, k, capacity, dispatcher):
  # All logits are equal. Catches: empty groups, a division by E - 1, ties broken otherwise than the oracle does.
  logits = np.zeros((1, tokens, experts), np.float32)
  x = _inputs()[1][:1, :tokens]
  weights = _experts(experts=experts)
  for name, options in (("top_k", {"k": k}), ("expert_choice", {"capacity_factor": float(k)})):
    plan = _route(name, options, logits, np.ones((1, tokens), bool))
    y = _forward(dispatcher)(_same_size(plan, tokens * experts), x, weights, capacity)
    kept = _oracle(name, options, logits, [None], capacity)[1][0]
    _close(y[0], reference.moe(kept, x[0], weights.weights))


@each_dispatcher
def test_a_gate_of_zero_keeps_its_slot_and_its_gradient(dispatcher):
  # All want expert 0, which has two slots; token 0's gate has underflowed. It still holds its slot, and its gate still
  # learns; token 2 gets nothing. Catches: `dispatch = combine > 0`, as in Mesh-TensorFlow.
  logits, x, d_y = _inputs()
  plan = _route("top_k", {"k": 1, "gate_norm": "none", "priority": "choice"}, logits)
  plan = plan.replace(expert=np.zeros_like(plan.expert), gate=np.where(np.arange(S) == 0, np.float32(0), plan.gate))
  y, d_gate, *_ = _dispatch(dispatcher)(_same_size(plan), x, _experts(), d_y, 2)
  assert np.all(np.any(y, axis=-1) == (np.arange(S) == 1))
  assert np.all(np.abs(d_gate[:, :2]) > 1e-4) and not np.any(d_gate[:, 2:])


@each_dispatcher
def test_bfloat16_rows(dispatcher):
  # Gates and sums stay in float32. Catches: wrong dtypes out (float32 results that double the memory), lost gradients.
  logits, x, d_y = _inputs()
  plan = _route("top_k", {"k": 4, "gate_norm": "none", "priority": "choice"}, logits)
  half = jnp.bfloat16
  plan = _same_size(plan)
  y, d_gate, d_x, d_experts = _dispatch(dispatcher)(plan, x.astype(half), _experts(), d_y.astype(half), None)
  assert (y.dtype, d_x.dtype, d_gate.dtype, d_experts.up.dtype) == (half, half, jnp.float32, jnp.float32)
  expected = _dispatch(dispatcher)(plan, x.astype(half).astype(jnp.float32), _experts(), d_y, None)
  _close([y, d_gate, d_x, d_experts.weights], [*expected[:3], expected[3].weights], 0.05)


@each_dispatcher
def test_vmap_over_seeds(dispatcher):
  # Two models at once equal each alone. Catches: a host-side shape or a loop bound that vmap cannot batch.
  run = _dispatch(dispatcher)
  many = []
  for seed in (0, 1):
    logits, x, d_y = _inputs(seed)
    many.append((_same_size(_route("top_k", TOP_2, logits)), x, _experts(seed), d_y))
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *many)
  together = jax.vmap(lambda *a: run(*a, capacity=2))(*stacked)
  for i, alone in enumerate(many):
    _close(jax.tree.map(lambda a, i=i: a[i], together), run(*alone, capacity=2))


@pytest.mark.parametrize("dispatcher", ["einsum", "scatter"])
@pytest.mark.parametrize("backward", [False, True])
def test_flops(dispatcher, backward):
  # The ideal is the experts' matmuls on exactly A rows. Catches: a one-hot matmul in scatter; einsum's cost is its
  # documented 4*G*S*E*C*D (three times that with the backward pass, whose masks' gradient makes it a fourth).
  tokens, experts, k, width, hidden = 128, 4, 2, 64, 128
  capacity = expert_capacity(tokens, experts, tokens * k, 1.0, "assignments", 1)
  logits = np.random.default_rng(0).normal(size=(1, tokens, experts)).astype(np.float32)
  x = np.ones((1, tokens, width), np.float32)
  plan = _route("top_k", {"k": k}, logits, np.ones((1, tokens), bool))
  forward = lambda gate, x, w: DISPATCHERS[dispatcher](plan.replace(gate=gate), x, w, capacity, "cpu")
  f = jax.grad(lambda *a: jnp.sum(jnp.sin(forward(*a))), argnums=(0, 1, 2)) if backward else forward
  compiled = jax.jit(f).lower(plan.gate, x, _experts(0, experts, width, hidden)).compile()
  cost = compiled.cost_analysis()
  flops = (cost[0] if isinstance(cost, list) else cost)["flops"]
  ideal = tokens * k * 2 * 3 * width * hidden * (3 if backward else 1)
  masks = 4 * tokens * experts * capacity * width
  if dispatcher == "scatter":
    assert ideal <= flops < 1.3 * ideal
  else:
    assert ideal + masks <= flops < 1.3 * ideal + (4 if backward else 1.1) * masks
