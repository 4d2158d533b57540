"""Compares routers with DeepSeek-V2, V2-Lite and V3 in transformers, at their published sizes."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax.numpy as jnp
import numpy as np
from published import compare
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moe_jax.routing import RoutingContext
from moe_jax.routing.device_limited import device_limited
from moe_jax.routing.sigmoid_bias import sigmoid_bias
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.reference

S = 48


def theirs(module, config, logits, bias=None):
  """Returns the table of a router of transformers.

  It scales the gates by a factor that our layer applies (`routed_scale`), so that the factor is
  divided out here.
  """
  router = module(config)
  if bias is not None:
    router.e_score_correction_bias.copy_(torch.tensor(bias))
  _, (_, gate, expert) = compare.feed(router, router.weight, logits)
  return compare.of_choices(expert, gate / config.routed_scaling_factor, logits.shape[-1])


def test_v2_lite():
  # Catches gates that are renormalised.
  config = DeepseekV2Config(
    hidden_size=64,
    num_attention_heads=1,
    n_routed_experts=64,
    num_experts_per_tok=6,
    topk_method="greedy",
  )
  logits = compare.draw(S, 64)
  plan = top_k(jnp.asarray(logits), RoutingContext(), k=6, gate_norm="none")
  compare.assert_same(compare.of_plan(plan, S), theirs(DeepseekV2TopkRouter, config, logits))


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_v2(kept):
  # Catches devices that are ranked by a sum and not by their best expert, a softmax over the kept
  # devices only, and experts that are assigned to devices in turn and not in blocks.
  config = DeepseekV2Config(
    hidden_size=160,
    num_attention_heads=1,
    n_routed_experts=160,
    num_experts_per_tok=6,
    topk_method="group_limited_greedy",
    n_group=8,
    topk_group=kept,
    routed_scaling_factor=16.0,
  )
  logits = compare.draw(S, 160, seed=kept)
  plan = device_limited(jnp.asarray(logits), RoutingContext(), k=6, groups=8, kept_groups=kept)
  compare.assert_same(compare.of_plan(plan, S), theirs(DeepseekV2TopkRouter, config, logits))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("groups, kept", [(1, 1), (8, 4), (8, 1)])
def test_v3(groups, kept, norm):
  # The bias has both signs and changes the choices.
  # Catches a gate that contains the bias, groups that are ranked without the bias or by their best
  # expert alone, gates that are not renormalised, and experts of groups that are not kept but are
  # chosen because their score is positive.
  config = DeepseekV3Config(
    hidden_size=256,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=groups,
    topk_group=kept,
    norm_topk_prob=norm,
  )
  logits = compare.draw(S, 256, seed=groups + kept)
  bias = compare.draw(256, seed=7) / 10 - 0.5
  plan = sigmoid_bias(
    jnp.asarray(logits),
    RoutingContext(bias=jnp.asarray(bias)),
    k=8,
    groups=groups,
    kept_groups=kept,
    gate_norm="top_k" if norm else "none",
  )
  expected = theirs(DeepseekV3TopkRouter, config, logits, bias)
  compare.assert_same(compare.of_plan(plan, S), expected)
  plain = sigmoid_bias(jnp.asarray(logits), RoutingContext(), k=8, groups=groups, kept_groups=kept)
  # Without the bias, other experts are chosen. Otherwise the bias would not be tested.
  assert np.any(np.isnan(compare.of_plan(plain, S)) != np.isnan(expected))
