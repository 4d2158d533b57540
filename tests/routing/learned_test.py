"""Tests the access to fields of RoutingContext that a router requires."""

import jax.numpy as jnp
import pytest

from moe_jax.routing import RoutingContext
from moe_jax.routing.learned import learned

pytestmark = pytest.mark.unit


def test_missing_and_present():
  # Catches arithmetic with None, and noise in the model's dtype.
  with pytest.raises(ValueError, match="router r needs RoutingContext.primary"):
    learned("r", RoutingContext(), "primary")
  value = learned("r", RoutingContext(threshold=jnp.ones(3, jnp.bfloat16)), "threshold")
  assert value.dtype == jnp.float32 and value.shape == (3,)
