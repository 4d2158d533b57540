"""Tests DeepSeek-V2's device-limited routing by hand and against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracles import compare
from oracles.device_limited import device_limited as oracle

from moe_jax.errors import ConfigError
from moe_jax.routing import RoutingContext
from moe_jax.routing.device_limited import ROUTER, device_limited

pytestmark = pytest.mark.numerics

# There are three devices with two experts each. The best probabilities on the devices are 0.3, 0.25
# and 0.2 for token 0; 0.4, 0.15 and 0.2 for token 1; 0.1, 0.3 and 0.3 for token 2; and 0.2, 0.1 and
# 0.5 for token 3.
PROBS = np.array(
  [
    [0.3, 0.04, 0.25, 0.01, 0.2, 0.2],
    [0.4, 0.02, 0.15, 0.08, 0.15, 0.2],
    [0.1, 0.05, 0.05, 0.3, 0.2, 0.3],
    [0.1, 0.2, 0.06, 0.1, 0.5, 0.04],
  ]
)
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))


def _triples(logits, bias=None, **options):
  route = jax.jit(functools.partial(device_limited, **options))
  plan = route(logits, RoutingContext(bias=None if bias is None else jnp.asarray(bias)))
  return [(t, e, round(g, 4)) for t, e, g in reference.assignments(plan)]


def test_by_hand():
  # Each token uses two devices and three experts. Token 0 uses devices 0 and 1 with 0.3, 0.25 and
  # 0.04, although device 2 has 0.2. Token 1 uses devices 0 and 2 with 0.4, 0.2 and 0.15. Token 2
  # uses devices 1 and 2, where experts 3 and 5 tie at 0.3, and then expert 4. Token 3 uses devices
  # 2 and 0 with 0.5, 0.2 and 0.1. Catches an unlimited top-k, devices that are ranked by their
  # sums, and renormalised gates.
  triples = _triples(LOGITS, k=3, groups=3, kept_groups=2)
  assert triples == [
    (0, 0, 0.3),
    (1, 0, 0.4),
    (2, 3, 0.3),
    (3, 4, 0.5),
    (0, 2, 0.25),
    (1, 5, 0.2),
    (2, 5, 0.3),
    (3, 1, 0.2),
    (0, 1, 0.04),
    (1, 4, 0.15),
    (2, 4, 0.2),
    (3, 0, 0.1),
  ]


def test_the_bias_selects_devices_and_experts():
  # A bias of 0.5 gives expert 3 a score of 0.51 for token 0, so that device 1 is the best and its
  # expert 3 comes first. The gates are the probabilities 0.01 and 0.25, or 0.01/0.26 and 0.25/0.26.
  # Catches a bias that is ignored when devices are selected, or that changes the gate.
  options = {"k": 2, "groups": 3, "kept_groups": 1, "bias": [0.0, 0.0, 0.0, 0.5, 0.0, 0.0]}
  assert _triples(LOGITS[:1], **options) == [(0, 3, 0.01), (0, 2, 0.25)]
  assert _triples(LOGITS[:1], gate_norm="top_k", **options) == [(0, 3, 0.0385), (0, 2, 0.9615)]


@pytest.mark.parametrize(
  "options",
  [
    {"k": 3, "groups": 4, "kept_groups": 2},
    {"k": 4, "groups": 2, "kept_groups": 1, "gate_norm": "top_k", "priority": "token"},
    {"k": 8, "groups": 8, "kept_groups": 8},
  ],
)
def test_equals_the_oracle(options):
  # Catches the faults above on 60 draws of 8 experts, errors at K = E and with one expert per
  # device, and padding that takes an expert.
  compare.check_oracle(
    device_limited, oracle, compare.draw_logits(1), compare.draw_context(1), **options
  )


def test_equals_the_oracle_with_a_bias():
  # Catches a bias that is left out of the score of a device or that orders tokens, and padding that
  # is not last. There are no ties here, because rounding would distinguish tokens that have the
  # same probabilities at different experts.
  context = compare.draw_context(2, bias=np.float32(np.random.default_rng(0).normal(size=8) * 0.1))
  compare.check_oracle(
    device_limited,
    oracle,
    compare.draw_logits(2, tied=0),
    context,
    k=3,
    groups=4,
    kept_groups=2,
    priority="gate",
  )


@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (4, 1), (1, 6)])
def test_corners(tokens, experts):
  # Catches errors at E = 1 and S = 1.
  compare.check_oracle(
    device_limited,
    oracle,
    compare.draw_logits(3, 5, tokens, experts),
    compare.draw_context(3, 5, tokens),
    k=1,
    groups=1,
    kept_groups=1,
  )


def test_appended_padding_changes_nothing():
  # Catches rows of padding that count.
  compare.check_appended_padding(device_limited, k=2, groups=4, kept_groups=3, priority="gate")


def test_router_gradient():
  # Catches a gate without gradient, and a gradient that is not finite because experts outside the
  # limit have the score -inf.
  route = functools.partial(device_limited, groups=3, kept_groups=2)
  variants = [{"k": 1}, {"k": 3}, {"k": 3, "gate_norm": "top_k"}, {"k": 1, "gate_norm": "top_k"}]
  *learning, constant = compare.gradients(route, LOGITS, RoutingContext(), variants)
  for gradient in learning:
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0.01
  assert not np.any(constant)  # The gate is the constant 1, as the docstring says.


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"groups": 4}, "groups"),
    ({"groups": 3, "kept_groups": 4}, "kept_groups"),
    ({"k": 5, "groups": 3, "kept_groups": 2}, "k=5"),
    ({"groups": 3, "k": 2, "gate_norm": "topk"}, "gate_norm"),
    ({"groups": 3, "k": 2, "priority": "random"}, "priority"),
  ],
)
def test_bad_options_are_named(options, field):
  # Catches an error inside XLA instead of one that names the option.
  with pytest.raises(ConfigError, match=f"device_limited.{field}"):
    device_limited(LOGITS, RoutingContext(), **options)


def test_bfloat16_logits_give_float32_gates():
  # Catches a softmax in the model's dtype.
  route = jax.jit(functools.partial(device_limited, k=6, groups=3, kept_groups=3))
  plan = route(LOGITS.astype(jnp.bfloat16), RoutingContext())
  assert plan.gate.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(plan.gate).reshape(6, 4).sum(axis=0), 1.0, rtol=1e-6)


def test_looks_ahead_default_is_the_routers_default():
  # Catches defaults that differ from those of the router.
  assert ROUTER.leak() == "overflow"
  assert ROUTER.leak(priority="gate") == "yes" and ROUTER.leak(k=1) == "no"
