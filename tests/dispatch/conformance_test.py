"""Tests that every router and dispatcher must pass.

They compare values and gradients, with and without overflow, under jit. The loops of the oracles
give the expected values. The function `_dense`, which applies every expert to every token and
weights the results by the oracle's gates, gives the expected gradients, and its values are compared
with the oracle. A new router needs one line in CASES, and a new dispatcher needs none.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from moe_jax.dispatch import DISPATCHERS, drop_overflow, expert_capacity
from moe_jax.experts import Experts
from moe_jax.routing import ROUTERS, RoutingContext, group_axes

pytestmark = pytest.mark.conformance

G, S, E, D, F = 2, 16, 4, 6, 8
PADDING = np.arange(S) < np.array([[S], [S - 3]])  # the second group ends in three padded tokens

CASES = [
  ("top_k", {"k": k, "gate_norm": norm, "priority": priority})
  for k, norm in [(1, "none"), (2, "top_k"), (4, "none")]
  for priority in ("choice", "token", "gate")
]
CASES += [
  ("top_k", {"k": 1, "gate_norm": "top_k"}),
  ("adaptive_mixture", {}),
  ("noisy_top_k", {"k": 2, "noise_floor": 0.01}),
  ("hierarchical", {"groups": 2, "primary_k": 1, "k": 2}),
  ("strictly_balanced", {"k": 2}),
  ("gshard", {}),
  ("gshard", {"threshold": 0.2, "skipped_keeps_slot": False}),
  ("no_token_left_behind", {"choices": 3, "capacity_factor": 0.75}),
  ("expert_choice", {"capacity_factor": 2.0}),
  ("capped_expert_choice", {"entropy": 0.05}),
  ("st_moe", {"k": 3}),
  ("st_moe", {"k": 2, "policy": "threshold", "priority": "gate"}),
  ("device_limited", {"k": 2, "groups": 2, "kept_groups": 1}),
  ("sigmoid_bias", {"k": 2, "groups": 2}),
  ("scored_top_k", {"k": 2, "score": "sqrt_softplus", "norm_eps": 1e-20}),
  ("scored_top_k", {"k": 2, "groups": 2, "group_score": "max", "priority": "gate"}),
  ("base", {"epsilon": 0.0625}),
  ("sinkhorn", {"k": 2}),
  ("hash_layer", {}),
  ("hash_top_k", {"k": 2}),
  ("random_choice", {"k": 2}),
  ("relu", {"k": 2}),
  ("relu", {"k": 2, "most": 2}),
  ("top_p", {"p": 0.6}),
  ("expert_threshold", {"k": 2}),
  ("sequence_top_k", {"k": 2}),
  ("token_rounding", {"k": 2, "tile": 4}),
  ("sparse_mixer", {"k": 2, "epsilon": 0.6}),
]
# Its gradient is an estimate and not that of its gates; sparse_mixer_test compares it.
ESTIMATED = ("sparse_mixer",)
# All other routers train their logits through the gates.
WITHOUT_GRADIENT = ("hash_layer", "random_choice")
TOP_2 = {"k": 2, "gate_norm": "top_k", "priority": "choice"}


def _label(v):
  return "-".join(str(o) for o in v.values()) if isinstance(v, dict) else None


each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=_label)
each_dispatcher = pytest.mark.parametrize("dispatcher", DISPATCHERS)
some_dispatchers = pytest.mark.parametrize(
  "dispatcher", tiny.often({"einsum", "grouped"}, DISPATCHERS)
)
each_capacity = pytest.mark.parametrize(
  "capacity", [2, S, None], ids=["overflow", "no_overflow", "dropless"]
)


def test_every_router_is_in_the_table():
  # Catches a new router without a line in CASES.
  assert {name for name, _ in CASES} == set(ROUTERS)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_looks_ahead_by_its_options(name):
  # Catches a `looks_ahead` function that depends on an option that the router does not have.
  assert ROUTERS[name].leak() in ("no", "overflow", "yes")


@functools.cache
def _experts(seed=0, experts=E, width=D, hidden=F):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)

  return Experts(
    up=normal(experts, width, hidden),
    gate=normal(experts, width, hidden),
    down=normal(experts, hidden, width),
    activation="swiglu",
  )


@functools.cache
def _inputs(seed=0):
  """Returns (logits, x, cotangent of y).

  Three experts are far more popular than the fourth, so that a capacity of 2 overflows.
  """
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(G, S, E)) * 2 + np.array([2.0, 0.5, 0.5, -1.0])
  return tuple(
    a.astype(np.float32) for a in (logits, rng.normal(size=(G, S, D)), rng.normal(size=(G, S, D)))
  )


def _context(name, valid):
  """Returns a training context for G groups with all fields that the router may read.

  Each group has its own key.
  """
  groups, tokens = valid.shape
  rng = np.random.default_rng(7)

  def positive(*shape):
    return jnp.asarray(rng.uniform(0.1, 1.0, shape), jnp.float32)

  fields = {
    "noise_std": positive(groups, tokens, E),
    "primary": positive(groups, tokens, 2) * 4,
    "primary_noise_std": positive(groups, tokens, 2),
    "threshold": positive(E),
  }
  return RoutingContext(
    key=jax.random.split(jax.random.key(0), groups),
    valid=jnp.asarray(valid),
    train=True,
    token_ids=jnp.asarray(rng.integers(0, 1000, (groups, tokens))),
    **{field: fields[field] for field in ROUTERS[name].learned},
  )


@functools.cache
def _router(name, items):
  """Returns the jitted router over groups, as a function of (logits, context, d_gate).

  The function returns the plan if d_gate is None. Otherwise it returns the gradient with respect to
  the logits, given the cotangent d_gate of the gates.
  """

  def route(logits, context, d_gate):
    def one(logits, context):
      return ROUTERS[name].route(logits, context, **dict(items))

    def many(logits):
      return jax.vmap(one, in_axes=(0, group_axes(context)))(logits, context)

    return many(logits) if d_gate is None else jax.vjp(lambda l: many(l).gate, logits)[1](d_gate)[0]

  return jax.jit(route)


def _route(name, options, logits, valid=PADDING, d_gate=None, ids=None):
  context = _context(name, np.asarray(valid))
  if ids is not None:
    context = context.replace(token_ids=jnp.asarray(ids))
  return _router(name, tuple(options.items()))(logits, context, d_gate)


def _one_group(context, g):
  axes = vars(group_axes(context))
  return context.replace(
    **{
      field: getattr(context, field)[g]
      for field, axis in axes.items()
      if field != "train" and axis is not None
    }
  )


def _same_size(plan, size=S * E):
  """Returns the plan with assignments to no expert appended up to `size`.

  All plans then have the same shape, so that one compilation serves all routers.
  """

  def fill(a, value):
    return np.pad(a, ((0, 0), (0, size - a.shape[1])), constant_values=value)

  return plan.replace(
    token=fill(plan.token, 0), expert=fill(plan.expert, plan.num_experts), gate=fill(plan.gate, 0)
  )


@functools.partial(jax.jit, static_argnums=1)
def _drop(plan, capacity):
  return jax.vmap(lambda p: drop_overflow(p, capacity))(plan)


def _kept(plan, capacity):
  """Returns, for each group, the assignments that remain after `drop_overflow`."""
  dropped = jax.device_get(_drop(plan, capacity))
  return [
    reference.assignments(jax.tree.map(lambda a, g=g: a[g], dropped))
    for g in range(plan.token.shape[0])
  ]


@functools.cache
def _dispatch(name):
  """Returns the jitted dispatcher with all its gradients.

  It is a function from (plan, x, experts, d_y, capacity) to (y, d_gate, d_x, d_experts).
  """

  def run(plan, x, experts, d_y, capacity):
    def f(gate, x, experts):
      return DISPATCHERS[name](plan.replace(gate=gate), x, experts, capacity, "cpu")

    y, pull = jax.vjp(f, plan.gate, x, experts)
    return y, *pull(d_y)

  return jax.jit(run, static_argnames="capacity")


@functools.cache
def _forward(name):
  return jax.jit(
    lambda plan, x, experts, capacity: DISPATCHERS[name](plan, x, experts, capacity, "cpu"),
    static_argnums=3,
  )


def _oracle_of(name):
  """Returns a function from (logits of a group, its context, **options) to its assignments."""
  if name in reference.ROUTERS:
    return lambda logits, context, **options: reference.ROUTERS[name](
      logits, **options, valid=None if context.valid is None else np.asarray(context.valid)
    )
  return getattr(importlib.import_module(f"oracles.{name}"), name)


def _oracle(name, options, logits, valid, capacity):
  """Returns the oracle's plan of each group, and the assignments that remain under capacity."""
  context = _context(name, np.asarray(valid))
  plans = [_oracle_of(name)(l, _one_group(context, g), **options) for g, l in enumerate(logits)]
  return plans, [reference.drop_overflow(p, logits.shape[-1], capacity) for p in plans]


def _mask(plans, shape):
  mask = np.zeros(shape, np.float32)
  for g, plan in enumerate(plans):
    for token, expert, _ in plan:
      assert mask[g, token, expert] == 0
      mask[g, token, expert] = 1
  return mask


@jax.jit
def _dense(gates, x, weights, d_y):
  """Applies every expert to every token and returns the value and all gradients.

  The gradients are those with respect to gates [G, S, E], x and weights.
  """

  def f(gates, x, w):
    g = jnp.einsum("gsd,edf->gsef", x, w["gate"])
    hidden = g * jax.nn.sigmoid(g) * jnp.einsum("gsd,edf->gsef", x, w["up"])
    return jnp.einsum("gse,gsef,efd->gsd", gates, hidden, w["down"])

  y, pull = jax.vjp(f, gates, x, weights)
  return y, *pull(d_y)


def _close(actual, expected, tolerance=2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
    ),
    actual,
    expected,
  )


# All routers are tested with one dispatcher, and all dispatchers are tested with plans of each
# shape: K assignments per token in the order of choices or of gates, assignments to no expert,
# expert choice, and one expert per token. `make test-all` tests the other pairs, too.
SHAPES = {
  ("top_k", "2-top_k-choice"),
  ("top_k", "4-none-gate"),
  ("gshard", "0.2-False"),
  ("expert_choice", "2.0"),
  ("hash_layer", ""),
}
PAIRS = [
  pytest.param(
    name,
    options,
    dispatcher,
    id="-".join(filter(None, (name, _label(options), dispatcher))),
    marks=()
    if dispatcher == "einsum" or (name, _label(options)) in SHAPES
    else pytest.mark.every_variant,
  )
  for name, options in CASES
  for dispatcher in DISPATCHERS
]


def test_the_shapes_are_cases():
  # Catches a case that was renamed, so that its shape of plan is no longer tested with each
  # dispatcher.
  assert {(name, _label(options)) for name, options in CASES} >= SHAPES


@each_capacity
@pytest.mark.parametrize(("name", "options", "dispatcher"), PAIRS)
def test_values_and_gradients(name, options, dispatcher, capacity):
  # Catches a different order under overflow, a slot that is off by one, a gradient of a dropped
  # gate, padding that takes a slot, gates that are renormalised after overflow is dropped, and
  # weight gradients of the wrong expert.
  logits, x, d_y = _inputs()
  experts = _experts()
  plan = _route(name, options, logits)
  y, d_gate, d_x, d_experts = _dispatch(dispatcher)(_same_size(plan), x, experts, d_y, capacity)

  plans, kept = _oracle(name, options, logits, PADDING, capacity)
  # The exceptions are routers that limit the number of tokens per expert themselves.
  if name not in ("no_token_left_behind", "base", "strictly_balanced"):
    # Only capacity 2 overflows.
    assert any(len(k) < len(p) for k, p in zip(kept, plans, strict=True)) == (capacity == 2)
  expected = np.stack(
    [reference.moe(k, rows, experts.weights) for k, rows in zip(kept, x, strict=True)]
  )
  _close(y, expected)
  gates = np.zeros(logits.shape, np.float32)
  for g, assignments in enumerate(kept):
    for token, expert, gate in assignments:
      gates[g, token, expert] = gate
  dense_y, d_gates, *gradients = _dense(gates, x, experts.weights, d_y)
  _close(dense_y, expected)
  served = _mask(kept, logits.shape)
  here = np.minimum(plan.expert, E - 1)

  def of_plan(a):
    return np.take_along_axis(a[np.arange(G)[:, None], plan.token], here[..., None], -1)[..., 0]

  named = np.asarray(plan.expert) < E
  _close(d_gate[:, : plan.gate.shape[1]], named * of_plan(served) * of_plan(np.asarray(d_gates)))
  _close([d_x, d_experts.weights], gradients)


@pytest.mark.parametrize(
  ("name", "options"),
  [c for c in CASES if c[1].get("priority", "choice") == "choice" and c[0] not in ESTIMATED],
  ids=_label,
)
def test_gradient_of_the_gates(name, options):
  # Compares with finite differences of the float64 oracle, whose choice a step of 1e-5 does not
  # change. Catches a gradient that is stopped although the paper has one, and a gradient through
  # scores that only select experts.
  logits, _, _ = _inputs()
  plan = _route(name, options, logits)
  d_gate = np.random.default_rng(3).normal(size=plan.gate.shape).astype(np.float32)
  actual = np.asarray(_route(name, options, logits, d_gate=d_gate))
  weight = [
    {(int(t), int(e)): float(d) for t, e, d in zip(*rows, strict=True) if e < E}
    for rows in zip(plan.token, plan.expert, d_gate, strict=True)
  ]
  context = _context(name, PADDING)

  def total(logits, g):
    return sum(
      gate * weight[g][token, expert]
      for token, expert, gate in _oracle_of(name)(logits, _one_group(context, g), **options)
    )

  g, step = 1, 1e-5  # the group with padding
  for token in (5, S - 4):
    for expert in range(E):
      above, below = logits[g].astype(np.float64), logits[g].astype(np.float64)
      above[token, expert] += step
      below[token, expert] -= step
      expected = (total(above, g) - total(below, g)) / (2 * step)
      assert actual[g, token, expert] == pytest.approx(expected, rel=1e-3, abs=1e-4)
  constant = (
    name in WITHOUT_GRADIENT or options.get("k") == 1 and options.get("gate_norm") == "top_k"
  )
  assert np.any(np.abs(actual) > 1e-3) != constant


@pytest.mark.parametrize("capacity", [2, None])
@each_case
def test_plan_invariants_and_drop(name, options, capacity):
  # Checks the four invariants of RoutingPlan. Catches nonzero gates of assignments to no expert,
  # pairs that occur twice (in `_mask`), and overflow that is dropped in the wrong order.
  logits, _, _ = _inputs()
  plan = _route(name, options, logits)
  token, expert, gate = map(np.asarray, (plan.token, plan.expert, plan.gate))
  assert gate.dtype == np.float32 and plan.num_experts == E
  assert token.min() >= 0 and token.max() < S and expert.min() >= 0 and expert.max() <= E
  # The gates of `relu` are logits and have no upper bound.
  highest = np.inf if name == "relu" else 1 + 1e-6
  assert np.all(gate[expert == E] == 0) and np.all((gate >= 0) & (gate <= highest))
  plans, kept = _oracle(name, options, logits, PADDING, capacity)
  dropped = _drop(plan, capacity)
  for served, expecteds in ((_kept(plan, None), plans), (_kept(plan, capacity), kept)):
    for actual, expected in zip(served, expecteds, strict=True):
      assert [a[:2] for a in actual] == [e[:2] for e in expected]
      _close([a[2] for a in actual], [e[2] for e in expected])
  assert np.all(np.asarray(dropped.gate)[np.asarray(dropped.expert) == E] == 0)


@pytest.mark.parametrize(
  ("dispatcher", "platform"), [*((name, "cpu") for name in DISPATCHERS), ("grouped", "tpu")]
)
def test_experts_with_biases(dispatcher, platform):
  # The experts are gpt-oss's, with ST-MoE's factors on their hidden units besides. Catches a
  # dispatcher whose experts ignore a bias, use that of another expert or give it no gradient, and
  # rows of no expert that contribute to its gradient.
  logits, x, d_y = _inputs()
  rng = np.random.default_rng(5)
  vectors = {"hidden_bias": F, "up_bias": F, "gate_bias": F, "down_bias": D}
  experts = _experts().replace(
    activation="clamped_swiglu",
    ffn_bias="multiplicative",
    **{name: jnp.asarray(rng.normal(size=(E, n)), jnp.float32) for name, n in vectors.items()},
  )
  plan = _route("top_k", TOP_2, logits)
  gates = np.zeros(logits.shape, np.float32)
  for g, assignments in enumerate(_kept(plan, 2)):
    for token, expert, gate in assignments:
      gates[g, token, expert] = gate

  def dispatched(x, experts):
    return DISPATCHERS[dispatcher](plan, x, experts, 2, platform)

  def dense(x, experts):
    w = experts.weights
    g, up = (jnp.einsum("gsd,edf->gsef", x, w[n]) + w[f"{n}_bias"] for n in ("gate", "up"))
    g, up = jnp.minimum(g, 7), jnp.clip(up, -7, 7)
    hidden = g * jax.nn.sigmoid(1.702 * g) * (up + 1) * w["hidden_bias"]
    outputs = jnp.einsum("gsef,efd->gsed", hidden, w["down"]) + w["down_bias"]
    return jnp.einsum("gse,gsed->gsd", gates, outputs)

  @functools.partial(jax.jit, static_argnums=0)
  def with_gradients(f):
    y, pull = jax.vjp(f, jnp.asarray(x), experts)
    return y, pull(jnp.asarray(d_y))

  _close(with_gradients(dispatched), with_gradients(dense))


@some_dispatchers
def test_jit_equals_no_jit(dispatcher):
  # Catches a Python value that tracing turned into a constant.
  logits, x, d_y = _inputs()
  plan = _route("top_k", TOP_2, logits)
  eager = DISPATCHERS[dispatcher](plan, jnp.asarray(x), _experts(), 2, "cpu")
  _close(eager, _dispatch(dispatcher)(_same_size(plan), x, _experts(), d_y, 2)[0])


@each_dispatcher
def test_new_values_do_not_recompile(dispatcher):
  # Catches shapes that depend on the routing (such as group sizes that are Python numbers), weak
  # types, and a plan with static arrays.
  run, sizes = _dispatch(dispatcher), []
  for seed in (0, 1):
    logits, x, d_y = _inputs(seed)
    run(_same_size(_route("top_k", TOP_2, logits)), x, _experts(seed), d_y, 2)
    sizes.append(run._cache_size())
  assert sizes[0] == sizes[1]


@each_dispatcher
def test_permuted_tokens_give_permuted_results(dispatcher):
  # Without dropping, only the set of tokens matters. Catches dispatch that depends on positions,
  # and results that are brought back into order by the wrong map.
  logits, x, d_y = _inputs()
  order = np.random.default_rng(0).permutation(S)
  for name, options in (("top_k", TOP_2), ("expert_choice", {"capacity_factor": 2.0})):

    def run(l, x, valid, name=name, options=options):
      return _dispatch(dispatcher)(
        _same_size(_route(name, options, l, valid)), x, _experts(), d_y, None
      )[0]

    _close(run(logits[:, order], x[:, order], PADDING[:, order]), run(logits, x, PADDING)[:, order])


@each_dispatcher
@pytest.mark.parametrize(
  ("name", "short", "long"),
  [
    ("top_k", TOP_2 | {"priority": "gate"}, TOP_2 | {"priority": "gate"}),
    # Both factors give 8 slots.
    ("expert_choice", {"capacity_factor": 2.0}, {"capacity_factor": 2.0 * S / (S + 4)}),
  ],
)
def test_appended_padding_changes_nothing(name, short, long, dispatcher):
  # Catches padding that takes slots (all rows of zeros choose expert 0) or that gets a place by its
  # gate.
  logits, x, d_y = _inputs()

  def more(a):
    return np.concatenate([a, np.zeros((G, 4, a.shape[-1]), np.float32)], axis=1)

  valid = np.concatenate([PADDING, np.zeros((G, 4), bool)], axis=1)
  alone = _dispatch(dispatcher)(_same_size(_route(name, short, logits)), x, _experts(), d_y, 2)[0]
  padded = _forward(dispatcher)(
    _same_size(_route(name, long, more(logits), valid)), more(x), _experts(), 2
  )
  _close(padded[:, :S], alone)
  assert not np.any(padded[:, S:])


@each_dispatcher
def test_padded_rows_have_no_influence(dispatcher):
  # Catches content of a row of padding that reaches a real row, and a result other than 0 for
  # padding.
  logits, x, d_y = _inputs()
  plan = _route("top_k", TOP_2, logits)

  def run(x):
    return np.asarray(_dispatch(dispatcher)(_same_size(plan), x, _experts(), d_y, 2)[0])

  clean, dirty = run(x), run(np.where(PADDING[..., None], x, np.float32(1e6)))
  np.testing.assert_array_equal(clean, dirty)
  assert not np.any(clean[~PADDING])


@each_case
def test_causality_probe(name, options):
  # Changes the last tokens and their ids, and compares the experts of the earlier ones, with and
  # without overflow. Catches a router that looks ahead but does not declare it, and one that
  # declares it but does not look ahead.
  cut, valid = S // 2, np.ones((G, S), bool)
  unlimited = options | ({"capacity_factor": 100.0} if name == "no_token_left_behind" else {})
  logits = [_inputs(seed)[0] for seed in range(9)]
  logits = [
    logits[0],
    *(np.concatenate([logits[0][:, :cut], l[:, cut:]], axis=1) for l in logits[1:]),
  ]
  ids = np.random.default_rng(8).integers(0, 1000, (len(logits), G, S))
  ids[:, :, :cut] = ids[0, :, :cut]
  plans = [_route(name, options, l, valid, ids=i) for l, i in zip(logits, ids, strict=True)]

  def served(plan, capacity):
    return _mask(_kept(plan, capacity), logits[0].shape)[:, :cut]

  first = _first_choices(_route(name, unlimited, logits[0], valid, ids=ids[0]))[:, :cut]

  def differ(f):
    return any(np.any(f(p) != f(plans[0])) for p in plans[1:])

  dropless = differ(lambda p: served(p, None)) if name != "no_token_left_behind" else False
  anybody, firsts = differ(lambda p: served(p, 2)), differ(lambda p: served(p, 2) * first)
  seen = "yes" if dropless or firsts else "overflow" if anybody else "no"
  assert seen == ROUTERS[name].leak(**options)


def _first_choices(plan):
  """Returns a mask [G, S, E] of the experts that the plan lists first for a token."""
  mask = np.zeros((*PADDING.shape, E))
  for g, (token, expert) in enumerate(
    zip(np.asarray(plan.token), np.asarray(plan.expert), strict=True)
  ):
    for t, e in zip(token[::-1], expert[::-1], strict=True):
      if e < E:
        mask[g, t] = np.arange(E) == e
  return mask


@each_case
def test_routing_under_jit(name, options):
  # Catches a Python value that tracing turned into a constant, and shapes or types that depend on
  # values and cause another compilation.
  run, compiled = _router(name, tuple(options.items())), []
  for seed in (0, 1):
    logits = _inputs(seed)[0]
    plan = run(logits, _context(name, PADDING), None)
    compiled.append(run._cache_size())
  assert compiled[0] == compiled[1]
  plans, _ = _oracle(name, options, logits, PADDING, None)
  for actual, expected in zip(_kept(plan, None), plans, strict=True):
    assert [a[:2] for a in actual] == [e[:2] for e in expected]


@pytest.mark.parametrize(("priority", "second_of_first"), [("choice", False), ("token", True)])
def test_choice_major_order_lets_a_first_choice_displace_an_earlier_second_choice(
  priority, second_of_first
):
  # Token 0 chooses experts 0 and 1 in this order, token 1 chooses experts 1 and 0, and each expert
  # has one slot. In choice-major order (GShard, GLaM), token 1's first choice displaces token 0's
  # second choice although token 0 comes first. In token-major order, token 0 gets both experts.
  logits = np.array([[[2.0, 1.0], [1.0, 2.0]]], np.float32)
  plan = _route("top_k", {"k": 2, "priority": priority}, logits, np.ones((1, 2), bool))
  pairs = {(t, e) for t, e, _ in _kept(plan, 1)[0]}
  assert (
    (0, 0) in pairs
    and ((0, 1) in pairs) == second_of_first
    and ((1, 1) in pairs) != second_of_first
  )
  both = {(t, e) for t, e, _ in _kept(plan, 2)[0]}
  assert both == {(0, 0), (0, 1), (1, 0), (1, 1)}  # Without overflow nothing is displaced.


@each_dispatcher
@pytest.mark.parametrize(
  ("tokens", "experts", "k", "capacity"),
  [(1, 4, 2, None), (5, 1, 1, 2), (3, 3, 3, 1)],
  ids=["S=1", "E=1", "K=E"],
)
def test_degenerate_sizes_with_ties(tokens, experts, k, capacity, dispatcher):
  # All logits are equal. Catches errors with empty groups of experts, a division by E - 1, and ties
  # that are broken differently from the oracle.
  logits = np.zeros((1, tokens, experts), np.float32)
  x = _inputs()[1][:1, :tokens]
  weights = _experts(experts=experts)
  for name, options in (("top_k", {"k": k}), ("expert_choice", {"capacity_factor": float(k)})):
    plan = _route(name, options, logits, np.ones((1, tokens), bool))
    y = _forward(dispatcher)(_same_size(plan, tokens * experts), x, weights, capacity)
    kept = _oracle(name, options, logits, np.ones((1, tokens), bool), capacity)[1][0]
    _close(y[0], reference.moe(kept, x[0], weights.weights))


@each_dispatcher
def test_a_gate_of_zero_keeps_its_slot_and_its_gradient(dispatcher):
  # All tokens choose expert 0, which has two slots, and token 0's gate has underflowed to 0. Token
  # 0 still keeps its slot, and its gate still gets gradient; token 2 gets no slot. Catches
  # `dispatch = combine > 0`, as in Mesh-TensorFlow.
  logits, x, d_y = _inputs()
  plan = _route("top_k", {"k": 1, "gate_norm": "none", "priority": "choice"}, logits)
  plan = plan.replace(
    expert=np.zeros_like(plan.expert), gate=np.where(np.arange(S) == 0, np.float32(0), plan.gate)
  )
  y, d_gate, *_ = _dispatch(dispatcher)(_same_size(plan), x, _experts(), d_y, 2)
  assert np.all(np.any(y, axis=-1) == (np.arange(S) == 1))
  assert np.all(np.abs(d_gate[:, :2]) > 1e-4) and not np.any(d_gate[:, 2:])


@each_dispatcher
def test_bfloat16_rows(dispatcher):
  # Gates and sums stay in float32. Catches results of the wrong dtype (float32 would double the
  # memory), and lost gradients.
  logits, x, d_y = _inputs()
  plan = _route("top_k", {"k": 4, "gate_norm": "none", "priority": "choice"}, logits)
  half = jnp.bfloat16
  plan = _same_size(plan)
  y, d_gate, d_x, d_experts = _dispatch(dispatcher)(
    plan, x.astype(half), _experts(), d_y.astype(half), None
  )
  assert (y.dtype, d_x.dtype, d_gate.dtype, d_experts.up.dtype) == (
    half,
    half,
    jnp.float32,
    jnp.float32,
  )
  expected = _dispatch(dispatcher)(plan, x.astype(half).astype(jnp.float32), _experts(), d_y, None)
  _close([y, d_gate, d_x, d_experts.weights], [*expected[:3], expected[3].weights], 0.05)


@some_dispatchers
def test_vmap_over_seeds(dispatcher):
  # Two models together give the same results as each alone. Catches a shape that is computed on the
  # host, and a loop bound that vmap cannot batch.
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
  # The ideal is the cost of the experts' matmuls on exactly A rows. The masks of `einsum` cost the
  # documented 4*G*S*E*C*D in the forward pass, and at most four times that with the backward pass,
  # because of the gradient of the masks. Catches a one-hot matmul in `scatter`.
  tokens, experts, k, width, hidden = 128, 4, 2, 64, 128
  capacity = expert_capacity(tokens, experts, tokens * k, 1.0, "assignments", 1)
  logits = np.random.default_rng(0).normal(size=(1, tokens, experts)).astype(np.float32)
  x = np.ones((1, tokens, width), np.float32)
  plan = _route("top_k", {"k": k}, logits, np.ones((1, tokens), bool))

  def forward(gate, x, w):
    return DISPATCHERS[dispatcher](plan.replace(gate=gate), x, w, capacity, "cpu")

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
