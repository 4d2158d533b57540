"""What a `Router` says of itself."""

import pytest

from moe_jax.routing import ROUTERS, Router
from moe_jax.routing.noisy_top_k import load

pytestmark = pytest.mark.unit


def route(logits, context, *, k=2, priority="choice", other=0.5):
  raise NotImplementedError


def test_options_are_the_keyword_only_arguments():
  # Catches: positional arguments among the options, a default that is lost.
  assert Router(route, "no").options == {"k": 2, "priority": "choice", "other": 0.5}


def test_a_leak_reads_the_options_that_it_names():
  # Catches: defaults of the statement in place of the router's; an option that is not passed on, or one too many.
  router = Router(route, lambda k: "overflow" if k > 1 else "no")
  assert (router.leak(), router.leak(k=1), router.leak(k=2, other=3.0)) == ("overflow", "no", "overflow")
  assert Router(route, "yes").leak(k=1) == "yes"


def test_what_each_router_declares():
  # Catches: a router that learns or reads what it did not before.
  assert {name: router.learned for name, router in ROUTERS.items() if router.learned} == {
      "noisy_top_k": ("noise_std",), "hierarchical": ("noise_std", "primary", "primary_noise_std"),
      "strictly_balanced": ("threshold",)}
  assert {name for name, router in ROUTERS.items() if router.reads_bias} == {
      "top_k", "noisy_top_k", "device_limited", "sigmoid_bias"}
  assert {name for name, router in ROUTERS.items() if router.smooth_load} == {"noisy_top_k", "hierarchical"}
  assert ROUTERS["noisy_top_k"].smooth_load is load
