"""Tests the facts that each `Router` declares."""

import pytest

from moe_jax.routing import ROUTERS, Router
from moe_jax.routing.noisy_top_k import load

pytestmark = pytest.mark.unit


def route(logits, context, *, k=2, priority="choice", other=0.5):
  raise NotImplementedError


def test_options_are_the_keyword_only_arguments():
  # Catches positional parameters among the options, and a missing default.
  assert Router(route, "no").options == {"k": 2, "priority": "choice", "other": 0.5}


def test_a_leak_reads_the_options_that_it_names():
  # Catches defaults of the `looks_ahead` function instead of those of the router, an option that is
  # not passed on, and an option that should not be.
  router = Router(route, lambda k: "overflow" if k > 1 else "no")
  assert (router.leak(), router.leak(k=1), router.leak(k=2, other=3.0)) == (
    "overflow",
    "no",
    "overflow",
  )
  assert Router(route, "yes").leak(k=1) == "yes"


def test_what_each_router_declares():
  # Catches a router that learns or reads a field that it did not before.
  assert {name: router.learned for name, router in ROUTERS.items() if router.learned} == {
    "noisy_top_k": ("noise_std",),
    "hierarchical": ("noise_std", "primary", "primary_noise_std"),
    "strictly_balanced": ("threshold",),
  }
  assert {name for name, router in ROUTERS.items() if router.biased} == {
    "top_k",
    "noisy_top_k",
    "device_limited",
    "sigmoid_bias",
    "scored_top_k",
    "expert_threshold",
  }
  assert {name: router.rules for name, router in ROUTERS.items() if router.rules} == {
    "relu": ("sparsity",),
    "top_p": ("mean_k",),
    "expert_threshold": ("expert_quantile",),
  }
  assert {name for name, router in ROUTERS.items() if router.smooth_load} == {
    "noisy_top_k",
    "hierarchical",
  }
  assert ROUTERS["noisy_top_k"].smooth_load is load


# Each value is that of the paper or implementation that the docstring of the router names.
DEFAULTS = {
  "adaptive_mixture": {},
  "noisy_top_k": {"k": 4, "noise_floor": 0.0, "priority": "choice"},
  "hierarchical": {"groups": 4, "primary_k": 2, "k": 2, "priority": "choice"},
  "strictly_balanced": {"k": 4},
  "gshard": {"second_policy": "random", "threshold": 0.5, "skipped_keeps_slot": True},
  "top_k": {"k": 2, "gate_norm": "top_k", "priority": "choice"},
  "no_token_left_behind": {"choices": 4, "capacity_factor": 1.25},
  "expert_choice": {"capacity_factor": 2.0},
  "capped_expert_choice": {
    "capacity_factor": 2.0,
    "max_experts": 2,
    "entropy": 0.001,
    "iterations": 100,
  },
  "st_moe": {"k": 2, "policy": "random", "threshold": 0.2, "priority": "choice"},
  "device_limited": {
    "k": 6,
    "groups": 8,
    "kept_groups": 3,
    "gate_norm": "none",
    "priority": "choice",
  },
  "sigmoid_bias": {
    "k": 8,
    "groups": 1,
    "kept_groups": 1,
    "gate_norm": "top_k",
    "priority": "choice",
  },
  "scored_top_k": {
    "k": 2,
    "score": "softmax",
    "bias_on": "scores",
    "groups": 1,
    "kept_groups": 1,
    "group_score": "top_2_sum",
    "gate_norm": "top_k",
    "norm_eps": 0.0,
    "priority": "choice",
  },
  "base": {"epsilon": 0.01},
  "sinkhorn": {"k": 1, "iterations": 30, "temperature": 1.0, "priority": "choice"},
  "hash_layer": {"method": "random", "seed": 0},
  "hash_top_k": {
    "k": 2,
    "score": "sqrt_softplus",
    "gate_norm": "top_k",
    "norm_eps": 1e-20,
    "seed": 0,
  },
  "random_choice": {"k": 1, "seed": 0},
  "relu": {"k": 1, "most": 0},
  "top_p": {"p": 0.4, "k": 2, "most": 0},
  "expert_threshold": {"k": 2, "most": 0},
  "sequence_top_k": {"k": 2},
  "token_rounding": {"k": 2, "tile": 8, "rounding": "nearest"},
  "sparse_mixer": {"k": 2, "epsilon": 0.01},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_defaults(name):
  # Catches a changed default, which would change every run that does not set the option.
  assert ROUTERS[name].options == DEFAULTS[name]


def test_which_routers_compete():
  # Catches a router whose models do not generate although each token is routed by itself, and the
  # reverse.
  competing = {name for name, router in ROUTERS.items() if router.competes}
  assert competing == {"expert_choice", "capped_expert_choice", "sequence_top_k"}
