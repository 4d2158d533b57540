"""Tests how the Aux of single layers become the Aux of a model."""

import jax.numpy as jnp
import pytest

from moe_jax.layers.aux import Aux, concatenate, stack

pytestmark = pytest.mark.unit


def test_layers_without_experts_leave_no_trace():
  # Catches a dense layer that shifts the metrics of the next layer.
  one, two = (Aux({"z": jnp.asarray(v)}, {"load": jnp.full(3, v)}) for v in (1.0, 2.0))
  both = stack([Aux(), one, Aux(), two])
  assert both.losses["z"].tolist() == [1.0, 2.0] and both.metrics["load"].shape == (2, 3)
  assert concatenate([both, Aux(), stack([one])]).losses["z"].tolist() == [1.0, 2.0, 1.0]


def test_nothing_stays_nothing():
  # Catches a dense model that reports losses.
  assert stack([Aux(), Aux()]) == Aux() == concatenate([Aux()])
