"""Tests the checks of the options of routers."""

import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing.options import check, check_k, check_name

pytestmark = pytest.mark.unit


def test_messages_name_field_value_and_remedy():
  # Catches a field without its router, and a bound that is off by one at K = E or K = 0.
  with pytest.raises(ConfigError, match=r"model.moe.router.r.k=5: .* num_experts=4"):
    check_k("r", 5, 4)
  with pytest.raises(ConfigError, match="model.moe.router.r.primary_k=0"):
    check_k("r", 0, 4, "primary_k")
  with pytest.raises(ConfigError, match="model.moe.router.r.policy='randm': did you mean 'random'"):
    check_name("r", "policy", "randm", ("random", "all"))
  with pytest.raises(ConfigError, match="model.moe.router.r.x=-1: must be >= 0"):
    check("r", "x", -1, False, ">= 0")
  (
    check_k("r", 1, 4),
    check_k("r", 4, 4),
    check("r", "x", 0, True, ""),
    check_name("r", "p", "a", ("a",)),
  )
