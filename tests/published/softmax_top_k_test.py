"""Compares `top_k` with Mixtral, Qwen1.5-MoE, OLMoE and DBRX in transformers.

All of them choose the top K of a softmax over all experts. They have their published sizes.
"""

import functools
import types

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import numpy as np
from published import compare
from transformers import MixtralConfig, OlmoeConfig, Qwen2MoeConfig
from transformers.models.dbrx import modeling_dbrx as dbrx
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from moe_jax.routing import RoutingContext, losses
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.reference

S = 48


def _router(module, config):
  """Returns a router and its weight."""
  router = module(config)
  return router, router.weight


def _dbrx(num_experts, k):
  """Returns a router and its weight for DBRX, whose FFN makes the choices from the logits."""
  ffn = dbrx.DbrxFFN(
    types.SimpleNamespace(
      ffn_config=DbrxFFNConfig(
        hidden_size=num_experts, ffn_hidden_size=1, moe_num_experts=num_experts, moe_top_k=k
      )
    )
  )

  def route(hidden):
    logits = ffn.router(hidden)
    return logits, *ffn.route_tokens_to_experts(logits)

  return route, ffn.router.layer.weight


# Each entry has the number of experts E, the number of experts per token K, the `gate_norm`, a
# function that maps (E, K) to a router and its weight, and the module with the balance loss. A
# router maps hidden states to (logits, gates, experts).
MODELS = {
  "mixtral": (
    8,
    2,
    "top_k",
    lambda e, k: _router(
      mixtral.MixtralTopKRouter,
      MixtralConfig(hidden_size=e, num_local_experts=e, num_experts_per_tok=k),
    ),
    mixtral,
  ),
  "qwen2_moe": (
    60,
    4,
    "none",
    lambda e, k: _router(
      qwen2_moe.Qwen2MoeTopKRouter,
      Qwen2MoeConfig(hidden_size=e, num_experts=e, num_experts_per_tok=k),
    ),
    qwen2_moe,
  ),
  "olmoe": (
    64,
    8,
    "none",
    lambda e, k: _router(
      olmoe.OlmoeTopKRouter, OlmoeConfig(hidden_size=e, num_experts=e, num_experts_per_tok=k)
    ),
    olmoe,
  ),
  "dbrx": (16, 4, "top_k", _dbrx, dbrx),
}


@pytest.mark.parametrize("name", MODELS)
def test_choices_gates_and_their_gradient(name):
  # Catches gates that are renormalised although the published config says otherwise, or the
  # reverse, a softmax over the kept logits only, and a gradient through the choice.
  num_experts, k, gate_norm, make, _ = MODELS[name]
  logits = compare.draw(S, num_experts)
  hidden, (_, gate, expert) = compare.feed(*make(num_experts, k), logits)
  router = functools.partial(top_k, k=k, gate_norm=gate_norm)
  compare.assert_same(
    compare.of_plan(router(jnp.asarray(logits), RoutingContext()), S),
    compare.of_choices(expert, gate, num_experts),
  )
  torch.sum(torch.sin(3 * gate)).backward()
  ours = jax.grad(lambda l: jnp.sum(jnp.sin(3 * router(l, RoutingContext()).gate)))(
    jnp.asarray(logits)
  )
  np.testing.assert_allclose(ours, hidden.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_balance_loss_is_k_times_ours(name, masked):
  # The loss of transformers sums over the K choices, so that it is K at perfect balance. Ours
  # counts shares of choices and is 1.
  # Catches another factor, and padding that counts in f, in P or in the number of tokens.
  num_experts, k, gate_norm, _, module = MODELS[name]
  logits = compare.draw(S, num_experts, seed=1)
  # Expert 0 is chosen more often than the others.
  logits[:, 0] += 3.0
  valid = np.arange(S) % 12 < 7 if masked else np.ones(S, bool)
  mask = torch.tensor(valid.reshape(4, -1).astype(np.int64)) if masked else None
  theirs = module.load_balancing_loss_func((torch.tensor(logits),), num_experts, k, mask)
  plan = top_k(
    jnp.asarray(logits), RoutingContext(valid=jnp.asarray(valid)), k=k, gate_norm=gate_norm
  )
  ours = losses.balance(*losses.balance_terms(jnp.asarray(logits), plan, jnp.asarray(valid), "all"))
  assert float(ours) > 1.05
  assert float(theirs) == pytest.approx(k * float(ours), rel=1e-5)


def test_balance_loss_of_several_layers_is_of_averaged_terms():
  # transformers averages f and P over the layers and then multiplies them, whereas ours averages
  # the products of the layers. The two differ if two layers prefer different experts.
  # Catches terms that cannot be averaged as in transformers.
  both = compare.draw(2, S, 8, seed=2)
  both[0, :, 0] += 4.0
  both[1, :, 1] += 4.0
  theirs = mixtral.load_balancing_loss_func(tuple(torch.tensor(both)), 8, 2)
  terms = [
    losses.balance_terms(l, top_k(l, RoutingContext(), k=2), None, "all") for l in jnp.asarray(both)
  ]
  f, p = (losses.over_groups(jnp.stack(parts), None) for parts in zip(*terms, strict=True))
  assert float(theirs) == pytest.approx(2 * float(losses.balance(f, p)), rel=1e-5)
  assert float(theirs) < 0.8 * sum(2 * float(losses.balance(*t)) for t in terms) / 2


def test_z_loss():
  # transformers implements ST-MoE's z-loss only in Switch Transformers.
  # Catches the square of a mean, the logarithm of a mean of exponentials, and another base.
  logits = compare.draw(2, S, 8, seed=3)
  ours = losses.over_groups(jnp.stack([losses.z(l, None) for l in jnp.asarray(logits)]), None)
  assert float(switch.router_z_loss_func(torch.tensor(logits))) == pytest.approx(
    float(ours), rel=1e-5
  )
