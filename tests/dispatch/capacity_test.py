"""Tests capacity and slots against results computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import drop_overflow, expert_capacity, slot_index
from moe_jax.dispatch.capacity import CapacityOptions, slots
from moe_jax.errors import ConfigError
from moe_jax.routing import ROUTERS, RoutingContext, RoutingPlan
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  ("tokens", "experts", "k", "factor", "basis", "minimum", "expected"),
  [
    (1024, 128, 1, 1.25, "tokens", 1, 10),
    (2048, 32, 2, 1.25, "tokens", 1, 80),
    (4096, 64, 2, 2.0, "tokens", 1, 128),
    (456, 32, 2, 1.25, "tokens", 1, 18),  # 17.8, of which Mesh-TensorFlow's floor makes 17
    (4096, 64, 2, 1.25, "tokens", 4, 80),
    (4096, 64, 2, 1.25, "assignments", 4, 160),  # K times as many, as in V-MoE
    (256, 8, 2, 1.0, "assignments", 1, 64),  # GShard's 2N/(G E)
    (16, 64, 1, 1.0, "tokens", 1, 1),
    (16, 64, 1, 1.0, "tokens", 4, 4),  # 0.25
    (16, 2, 1, 9.0, "tokens", 1, 16),  # never more than S
    (2, 2, 1, 1.0, "tokens", 4, 2),
    (16, 4, 2, None, "tokens", 4, None),
  ],
)
def test_expert_capacity(tokens, experts, k, factor, basis, minimum, expected):
  # Catches a factor of K too many or too few, rounding down instead of to the nearest integer, and
  # a minimum that exceeds S.
  assert expert_capacity(tokens, experts, tokens * k, factor, basis, minimum) == expected


@pytest.mark.parametrize(
  ("factor", "basis", "minimum", "field"),
  [
    (1.0, "token", 1, "capacity_basis"),
    (0.0, "tokens", 1, "capacity_factor"),
    (None, "tokens", 0, "min_capacity"),
    (None, "choices", 1, "capacity_basis"),
  ],
)
def test_bad_capacity_is_named(factor, basis, minimum, field):
  with pytest.raises(ConfigError, match=field):
    expert_capacity(16, 4, 16, factor, basis, minimum)


# Assignments to 2 experts in order of priority, where index 2 stands for no expert. Assignments 0,
# 2 and 5 name expert 0, and assignments 1 and 4 name expert 1.
PLAN = RoutingPlan(
  token=jnp.array([0, 1, 2, 3, 0, 1]),
  expert=jnp.array([0, 1, 0, 2, 1, 0]),
  gate=jnp.array([0.9, 0.8, 0.0, 0.0, 0.5, 0.4]),
  num_experts=2,
)


def test_slot_index():
  # Catches inclusive counts, an unstable sort, and assignments to no expert that are counted for
  # the last expert.
  assert slot_index(PLAN).tolist() == [0, 0, 1, 0, 1, 2]


def test_drop_overflow():
  # Catches serving the last instead of the first assignments, a dropped assignment that keeps its
  # gate, and an assignment that loses its slot because its gate is 0.
  one, two = drop_overflow(PLAN, 1), drop_overflow(PLAN, 2)
  assert one.expert.tolist() == [0, 1, 2, 2, 2, 2] and two.expert.tolist() == [0, 1, 0, 2, 1, 2]
  np.testing.assert_allclose(two.gate, [0.9, 0.8, 0.0, 0.0, 0.5, 0.0])
  assert drop_overflow(PLAN, None) is PLAN
  again = drop_overflow(one, 1)
  assert again.expert.tolist() == one.expert.tolist()  # Assignments keep the slots they have.


def test_slots():
  # There are four tokens, and 4 marks an empty slot. Catches rows of the next expert in an empty
  # slot, and a read beyond the end.
  token, gate = slots(PLAN, 4, tokens=4)
  assert token.tolist() == [[0, 2, 1, 4], [1, 0, 4, 4]]
  np.testing.assert_allclose(gate, [[0.9, 0.0, 0.4, 0.0], [0.8, 0.5, 0.0, 0.0]])
  empty = PLAN.replace(expert=jnp.full(6, 2))
  assert np.all(slots(empty, 2, tokens=4)[0] == 4) and not np.any(slots(empty, 2, tokens=4)[1])


def test_priority_decides_who_is_left_out():
  # There are 256 tokens, 8 experts, K = 2 and 40 slots per expert (1.25 per token). Token-major
  # order leaves many tokens without an expert, and choice-major order leaves far fewer. Catches the
  # two orders swapped.
  logits = jax.random.normal(jax.random.key(0), (256, 8))
  alone = {}
  for priority in ("choice", "token"):
    kept = drop_overflow(top_k(logits, RoutingContext(), k=2, priority=priority), 40)
    served = np.zeros(256, bool)
    served[np.asarray(kept.token)[np.asarray(kept.expert) < 8]] = True
    alone[priority] = 1 - served.mean()
  assert alone["choice"] < 0.05 < 0.2 < alone["token"]


@pytest.mark.parametrize(
  ("tokens", "experts", "factor", "down", "nearest", "up"),
  [
    (1024, 128, 1.25, 10, 10, 10),
    (2048, 32, 1.25, 80, 80, 80),
    (456, 32, 1.25, 17, 18, 18),
    (455, 32, 1.25, 17, 18, 18),
    (100, 32, 1.0, 3, 3, 4),
  ],
)
def test_three_codebases_round_in_three_ways(tokens, experts, factor, down, nearest, up):
  # 456 * 1.25 / 32 is 17.8, which gives 17 slots in Mesh-TensorFlow and 18 in flaxformer. Catches
  # the same rounding for all.
  def slots(rounding):
    return expert_capacity(tokens, experts, tokens, factor, "tokens", 1, rounding)

  assert (slots("down"), slots("nearest"), slots("up")) == (down, nearest, up)
  with pytest.raises(ConfigError, match="capacity_rounding"):
    slots("floor")


@pytest.mark.parametrize(
  "factor, tokens, experts, rounding, expected",
  [
    (1.1, 1600, 4, "up", 440),
    (1.1, 1600, 4, "down", 440),
    (1.1, 1600, 4, "nearest", 440),
    (0.7, 100, 10, "down", 7),
    (1.15, 2000, 23, "up", 100),
    (2.3, 1000, 10, "up", 230),
    (1.25, 10, 4, "nearest", 3),
    (1.25, 6, 3, "nearest", 2),
  ],
)
def test_capacity_is_exact(factor, tokens, experts, rounding, expected):
  # Catches floating-point arithmetic, in which 1.1 * 1600 / 4 is slightly more than 440 and 0.7 *
  # 100 / 10 is slightly less than 7.
  assert expert_capacity(tokens, experts, tokens, factor, "tokens", 1, rounding) == expected


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), -1.0, 0.0])
def test_a_factor_that_is_no_positive_number_is_refused(factor):
  # Catches an OverflowError after the working directory was created, and a number of slots that is
  # computed from NaN.
  with pytest.raises(ConfigError, match="model.moe.capacity_factor=.*> 0 and finite"):
    expert_capacity(8, 2, 8, factor, "tokens", 1)
  for router in ("expert_choice", "capped_expert_choice", "no_token_left_behind"):
    with pytest.raises(
      ConfigError, match=f"model.moe.router.{router}.capacity_factor=.*> 0 .*finite"
    ):
      ROUTERS[router].route(jnp.zeros((8, 2)), RoutingContext(), capacity_factor=factor)


def test_slots_that_are_given():
  # Catches slots that grow with the group, and a factor that is used beside them.
  options = CapacityOptions(capacity_factor=2.0, eval_capacity_factor=3.0, capacity_slots=5)
  assert {options.slots(n, 4, 2 * n, train) for n in (8, 800) for train in (True, False)} == {5}
