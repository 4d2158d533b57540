"""The rules of loss-free balancing: by hand, against NumPy loops, and until the load is even."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.balancing import (
  HISTOGRAM,
  RULES,
  TARGET,
  BalancingOptions,
  lacking,
  observe,
  update,
)

E, K, N = 16, 3, 256


def options(rule, **changes):
  return BalancingOptions(rule=rule, **changes)


def first_state(rule, layers=1, experts=E):
  return {name: jnp.zeros((layers, experts)) for name in options(rule).state}


def draw(seed, tokens=N, experts=E, spread=1.0):
  """Returns logits of which some experts' are larger throughout."""
  rng = np.random.default_rng(seed)
  skew = spread * rng.normal(size=experts)
  return jnp.asarray(rng.normal(size=(tokens, experts)) + skew, jnp.float32)


def route(scores, bias, k):
  """Returns how many tokens choose each expert."""
  chosen = np.argsort(-(np.asarray(scores) + np.asarray(bias)), axis=-1)[:, :k]
  return np.bincount(chosen.reshape(-1), minlength=scores.shape[-1])


def violation(counts):
  return counts.max() / counts.mean() - 1


def one_step(rule, state, logits, k, valid=None, **changes):
  """Routes a batch of one layer, and returns the counts and the next state."""
  o = options(rule, **changes)
  scores = jax.nn.sigmoid(logits)
  valid = np.ones(len(logits), bool) if valid is None else valid
  counts = route(scores[valid], state["bias"][0], k)
  seen = observe(
    logits[None], state["bias"][0], jnp.asarray(valid)[None], scores=jax.nn.sigmoid, k=k, options=o
  )
  sums = {name: value[None] for name, value in seen.items()} | {"assigned": jnp.asarray([counts])}
  return counts, update(state, sums, o)


def test_signs_by_hand():
  # The assignments 2, 1, 1 and 0 to 4 experts have the mean 1, so the signs are -1, 0, 0 and +1.
  # The assignments 2, 1, 1 and 1 have the mean 5/4, so the signs are -1, +1, +1 and +1. Catches a
  # wrong sign, a mean over layers, and a division whose remainder is ignored.
  state = {"bias": jnp.asarray([[0.1, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])}
  assigned = jnp.asarray([[2, 1, 1, 0], [7, 7, 7, 7], [2, 1, 1, 1]])
  new = update(state, {"assigned": assigned}, options("sign", rate=0.01))
  np.testing.assert_allclose(
    new["bias"], [[0.09, 0, 0, 0.01], [0, 0, 0, 0], [-0.01, 0.01, 0.01, 0.01]], atol=1e-7
  )
  centred = update(state, {"assigned": assigned}, options("centred_sign", rate=0.01))
  np.testing.assert_allclose(centred["bias"][2], [-0.015, 0.005, 0.005, 0.005], atol=1e-7)
  assert update({}, {"assigned": assigned}, options("sign")) == {}


def test_signs_follow_exact_counts():
  # First, each of 49 experts has the mean load. Then one of them has 2 of 33 million assignments
  # more than another, which float32 cannot represent. Catches a bias that moves because of rounding
  # (49 shares of 1/49 do not have the mean 1/49), products of counts and E beyond 2^31, and counts
  # in float32.
  even = jnp.full((1, 49), 700_001)
  uneven = even.at[0, 0].add(1).at[0, 1].add(-1)
  still, moved = (
    update({"bias": jnp.zeros((1, 49))}, {"assigned": a}, options("sign", rate=1.0))["bias"][0]
    for a in (even, uneven)
  )
  assert not np.any(still) and moved.tolist() == [-1.0, 1.0] + [0.0] * 47


def test_what_an_expert_lacks_by_hand():
  # Catches a share that is not relative to an even one, and a division by 0 without assignments.
  got = lacking(jnp.asarray([[4, 2, 2, 0], [0, 0, 0, 0]]))
  np.testing.assert_allclose(got, [[-1, 0, 0, 1], [0, 0, 0, 0]])


def test_rules_with_a_memory_by_hand():
  # v is (-1, 0, 0, 1) in the first step and (1, 0, 0, -1) in the second. Catches a memory that is
  # not kept, terms of the controller that are swapped, and momentum of the wrong weight.
  first, second = ({"assigned": jnp.asarray([c])} for c in ([4, 2, 2, 0], [0, 2, 2, 4]))
  o = options("pid", rate=0.1, proportional=2.0, derivative=0.5)
  state = update(first_state("pid", experts=4), first, o)
  np.testing.assert_allclose(state["bias"][0], 0.1 * (1 + 2 + 0.5) * np.array([-1, 0, 0, 1]))
  state = update(state, second, o)
  # The sum of both is 0, v is now +1 for expert 0, and its change is +2.
  np.testing.assert_allclose(state["bias"][0], 0.1 * (0 + 2 + 1) * np.array([1, 0, 0, -1]))
  o = options("smebu", rate=0.1, slope=2.0, momentum=0.75)
  state = update(first_state("smebu", experts=4), first, o)
  once = 0.25 * np.tanh(2.0) * np.array([-1, 0, 0, 1])
  np.testing.assert_allclose(state["bias"][0], 0.1 * once, rtol=1e-6)
  state = update(state, second, o)
  np.testing.assert_allclose(state["momentum"][0], 0.75 * once - once, rtol=1e-6)
  np.testing.assert_allclose(state["bias"][0], 0.1 * (once - 0.25 * once), rtol=1e-5)


def test_quantiles_by_hand():
  # Four tokens choose 1 of 2 experts, whose scores are s and 1 - s; alpha is the smaller one. For
  # expert 0 alpha - s is 1 - 2s, if that is below 0, or 0. Sorted: -0.8, -0.6, -0.2, 0; the second
  # and third have the mean -0.4. For expert 1: -0.4, 0, 0, 0 and so 0. Minus the mean of -0.2, b is
  # -0.2 and 0.2. With it, two tokens go to each expert. Catches another order, another quantile and
  # a bias of the wrong sign.
  s = jnp.asarray([0.9, 0.8, 0.6, 0.3])
  logits = jnp.stack([s, 1 - s], axis=-1)
  seen = observe(
    logits[None],
    jnp.zeros(2),
    jnp.ones((1, 4), bool),
    scores=lambda x: x,
    k=1,
    options=options("quantile"),
  )
  np.testing.assert_allclose(seen[TARGET], [-0.2, 0.2], atol=1e-6)
  assert route(logits, seen[TARGET], 1).tolist() == [2, 2]


@pytest.mark.parametrize("seed", range(10))
def test_quantiles_against_loops(seed):
  # Catches padding that counts, an alpha without the bias, and a histogram whose bins are shifted:
  # the two forms may differ by a bin.
  rng = np.random.default_rng(seed)
  logits, bias = draw(seed), jnp.asarray(rng.normal(size=E) * 0.2, jnp.float32)
  valid = rng.random(N) < 0.8
  scores = np.asarray(jax.nn.sigmoid(logits), np.float64)
  wanted = np.zeros(E)
  for j in range(E):
    margins = sorted(
      sorted(scores[i] + np.asarray(bias), reverse=True)[K] - scores[i, j]
      for i in np.flatnonzero(valid)
    )
    c = round(len(margins) * K / E)
    wanted[j] = (margins[c - 1] + margins[c]) / 2
  wanted -= wanted.mean()
  state = {"bias": bias[None]}
  _, exact = one_step("quantile", state, logits, K, valid)
  np.testing.assert_allclose(exact["bias"][0], wanted, atol=1e-5)
  _, rough = one_step("quantile_histogram", state, logits, K, valid)
  gap = max(np.diff(sorted(np.asarray(scores)[valid].reshape(-1))).max(), 0.0)
  bin_width = (2 + float(bias.max() - bias.min())) / 1000
  # Neighbours among 205 sorted margins are up to 0.03 apart, and any number between them is right.
  np.testing.assert_allclose(rough["bias"][0], wanted, atol=gap + 2 * bin_width + 0.03)


def test_histograms_add_up():
  # Catches a range that depends on the batch, so that microbatches and devices cannot add.
  logits, bias = draw(0), jnp.linspace(-0.1, 0.1, E)

  def counts(part):
    ones = jnp.ones(part.shape[:1], bool)
    return observe(
      part[None],
      bias,
      ones[None],
      scores=jax.nn.sigmoid,
      k=K,
      options=options("quantile_histogram"),
    )[HISTOGRAM]

  np.testing.assert_array_equal(counts(logits[:100]) + counts(logits[100:]), counts(logits))
  assert int(counts(logits).sum()) == N * E


def test_prices_against_loops():
  # Catches a dual step without the clamp at 0, or with one more or fewer expert or token.
  logits = draw(3)
  s = np.asarray(jax.nn.sigmoid(logits), np.float64)
  q, c = np.zeros(E), N * K // E
  for _ in range(4):
    p = np.maximum(0, np.sort(s - q, axis=1)[:, ::-1][:, K])
    ordered = np.sort(s - p[:, None], axis=0)[::-1]
    q = np.maximum(0, (ordered[c - 1] + ordered[c]) / 2)
  _, state = one_step("bip", first_state("bip"), logits, K)
  np.testing.assert_allclose(state["bias"][0], -q, atol=1e-5)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.general])
def test_each_rule_evens_the_load(rule):
  # Catches a rule that moves away from balance or oscillates. The logits are drawn anew in each
  # step, with the same skew. The rules that know the scores need a few steps, the others dozens.
  rates = {"sign": 0.01, "centred_sign": 0.01, "smebu": 0.03, "proportional": 0.02, "pid": 0.02}
  changes = {"rate": rates[rule]} if rule in rates else {}
  state, skew = first_state(rule), draw(1, tokens=1)
  seen = []
  step = jax.jit(lambda state, logits: _traced_step(rule, state, logits, changes))
  for seed in range(60 if RULES[rule].observe is None else 20):
    noise = np.random.default_rng(seed + 100).normal(size=(4096, E))
    counts, state = step(state, jnp.asarray(noise, jnp.float32) + skew)
    seen.append(violation(np.asarray(counts)))
  assert seen[0] > 1.0 and np.mean(seen[-10:]) < 0.15, (rule, seen[0], np.mean(seen[-10:]))
  if RULES[rule].observe is not None:
    assert seen[4] < 0.2, (rule, seen[:5])


def _traced_step(rule, state, logits, changes, k=K):
  o = options(rule, **changes)
  scores = jax.nn.sigmoid(logits)
  chosen = jax.lax.top_k(scores + state["bias"][0], k)[1]
  counts = jnp.zeros(logits.shape[1], jnp.int32).at[chosen].add(1)
  valid = jnp.ones((1, len(logits)), bool)
  seen = observe(logits[None], state["bias"][0], valid, scores=jax.nn.sigmoid, k=k, options=o)
  sums = {name: value[None] for name, value in seen.items()} | {"assigned": counts[None]}
  return counts, update(state, sums, o)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_of_padding_changes_nothing(rule):
  # Catches a quantile of nothing, which would be infinite, and a division by 0.
  state = first_state(rule) | {"bias": jnp.linspace(-0.1, 0.1, E)[None]}
  _, after = one_step(rule, state, draw(0), K, valid=np.zeros(N, bool))
  assert all(np.isfinite(value).all() for value in after.values())
  if rule not in ("pid", "mean_k", "bip"):
    np.testing.assert_allclose(after["bias"], state["bias"], atol=1e-6)


@pytest.mark.parametrize("logits", [jnp.zeros((N, E)), jnp.full((N, E), 1e4), -1e4 * jnp.eye(N, E)])
@pytest.mark.parametrize("rule", RULES)
def test_hostile_logits_leave_the_bias_finite(rule, logits):
  # Catches overflow with saturated scores, ties and collapse.
  _, after = one_step(rule, first_state(rule), logits, K)
  assert all(np.isfinite(value).all() for value in after.values())


def test_one_update_of_the_quantile_does_what_hundreds_of_signs_do():
  # 4,096 tokens choose 8 of 64 experts whose logits are skewed. Catches a quantile that needs
  # several steps.
  logits = draw(0, tokens=4096, experts=64)
  counts, state = one_step("quantile", first_state("quantile", experts=64), logits, 8)
  before = violation(counts)
  after = violation(route(jax.nn.sigmoid(logits), state["bias"][0], 8))
  sign, steps = first_state("sign", experts=64), 0
  step = jax.jit(lambda state: _traced_step("sign", state, logits, {}, k=8))
  # The counts of a step are those of the bias before it.
  while violation(np.asarray((counted := step(sign))[0])) >= 0.2:
    sign, steps = counted[1], steps + 1
  assert before > 2.0 and after < 0.2 and steps > 200, (before, after, steps)


def test_a_quantile_between_the_edges_of_a_bin():
  # Four assignments to two experts: two tokens must lie below each quantile. Of expert 0 it is a
  # third into the bin of width 1/2 that starts at 2 (one token is before it, three are inside), of
  # expert 1 at the end of the second bin. Relative to their mean they are 1/6 of a bin apart from
  # it. Catches a place that is not counted from the tokens before the bin, and one token inside a
  # bin that counts as two.
  counts = jnp.asarray([[[0, 1, 3, 0], [1, 1, 1, 1]]])
  state = {"bias": jnp.zeros((1, 2))}
  sums = {HISTOGRAM: counts, "assigned": jnp.asarray([[3, 1]])}
  after = update(state, sums, options("quantile_histogram", rate=1.0, bins=4))
  np.testing.assert_allclose(after["bias"], [[1 / 12, -1 / 12]], atol=1e-6)


def test_which_rules_add_up_and_which_are_general():
  # Catches a rule that is refused with microbatches although its sums add up, or the reverse, and
  # one that a router would take that was made for another.
  assert {name for name, rule in RULES.items() if not rule.adds_up} == {
    "quantile",
    "bip",
    "expert_quantile",
  }
  assert {name for name, rule in RULES.items() if not rule.general} == {
    "sparsity",
    "mean_k",
    "expert_quantile",
  }
