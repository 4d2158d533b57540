"""Tests the rule by which the shares of the sources follow their losses, by hand-worked numbers."""

import math

import pytest

from moe_jax.data.dynamic import DynamicOptions, check, next_weights
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
LN2 = math.log(2)


def test_the_rule_of_the_paper():
  # The excess losses are ln 2, ln 3 and 0, because the last loss is below its reference. So the
  # shares 0.5, 0.3 and 0.2 become 1.0, 0.9 and 0.2, divided by their sum 2.1.
  # Catches a rule that lets a loss below its reference lower the share, or lacks the old shares.
  losses = [1.0 + LN2, 2.0 + math.log(3), 2.5]
  new = next_weights([0.5, 0.3, 0.2], losses, [1.0, 2.0, 3.0])
  assert new == pytest.approx([10 / 21, 9 / 21, 2 / 21], rel=1e-14)
  assert math.fsum(new) == pytest.approx(1, abs=1e-15)


def test_the_rule_of_the_released_code():
  # The excess losses are ln 2 and -ln 2, so that shares of 0.5 become 1 and 0.25, divided by 1.25:
  # 0.8 and 0.2. Of these 0.9 stay, and 0.1 is divided evenly: 0.77 and 0.23.
  # Catches a floor at the reference, and smoothing before the shares sum to 1.
  new = next_weights([0.5, 0.5], [1 + LN2, 2 - LN2], [1.0, 2.0], positive=False, smoothing=0.1)
  assert new == pytest.approx([0.77, 0.23], rel=1e-14)


def test_shares_stay_where_all_losses_are_reached():
  # Catches shares that drift without an excess.
  assert next_weights([0.25, 0.75], [1.0, 1.0], [2.0, 1.0]) == [0.25, 0.75]


def test_two_updates_multiply():
  # Catches a rule that starts from the first shares each time: 1/2 becomes 2/3 and then 4/5.
  once = next_weights([0.5, 0.5], [1 + LN2, 1.0], [1.0, 1.0])
  assert once == pytest.approx([2 / 3, 1 / 3], rel=1e-14)
  twice = next_weights(once, [1 + LN2, 1.0], [1.0, 1.0])
  assert twice == pytest.approx([4 / 5, 1 / 5], rel=1e-14)


def test_extreme_losses_neither_overflow_nor_end_a_source():
  # Catches exp() of a large loss, and a share of 0, which Grain refuses and which no later update
  # could raise again.
  new = next_weights([0.5, 0.5], [5000.0, 1.0], [0.0, 0.0])
  assert new == [1.0, 1e-30]
  assert next_weights(new, [0.0, 5000.0], [0.0, 0.0]) == [1e-30, 1.0]


@pytest.mark.parametrize(
  "losses, references", [([1.0], [1.0, 1.0]), ([1.0, math.nan], [1.0, 1.0]), ([1.0, 2.0], [1.0])]
)
def test_no_shares_follow_from_wrong_numbers(losses, references):
  # Catches NaN shares, and one loss that NumPy uses for all sources.
  with pytest.raises(ValueError):
    next_weights([0.5, 0.5], losses, references)


WRONG = [
  ({"every": 4}, ("a",), "windows", "data.dynamic.every=4: .* data.sources has 1; must be 0"),
  ({"every": 4}, ("a", "b"), "windows", r"references=\(\): needs one loss .* 2 .*\(a, b\)"),
  ({"every": 4, "references": (1.0,)}, ("a", "b"), "windows", "needs one loss for each of the 2"),
  (
    {"every": 4, "references": (1.0, 2.0, 3.0)},
    ("a", "b"),
    "windows",
    "needs one loss for each of the 2",
  ),
  (
    {"every": 3, "references": (1.0, 2.0)},
    ("a", "b"),
    "windows",
    "every=3: must be a multiple of train.eval_every=2, .* e.g. 4",
  ),
  ({"every": 4, "references": (1.0, 2.0)}, ("a", "b"), "stream", "data.pipeline='stream'"),
]


@pytest.mark.parametrize("options, sources, pipeline, words", WRONG)
def test_options_that_do_not_fit(options, sources, pipeline, words):
  # Catches a mistake that shows only at the first change of the shares, after hours of training.
  with pytest.raises(ConfigError, match=words):
    check(DynamicOptions(**options), sources, (), pipeline, 2)
  # Without changes of the shares nothing is wrong.
  check(DynamicOptions(**options | {"every": 0}), sources, (), pipeline, 2)


def test_options_that_fit():
  # Catches a check that refuses everything.
  check(DynamicOptions(every=4, references=(1.0, 2.0)), ("a", "b"), (0.3, 0.7), "windows", 2)


def test_a_source_without_a_share_stays_without():
  # Catches shares that are multiplied from 0, of which the smallest would be divided by.
  options = DynamicOptions(every=4, references=(1.0, 2.0))
  with pytest.raises(ConfigError, match="^data.weights=.*without a share"):
    check(options, ("a", "b"), (1.0, 0.0), "windows", 2)
