"""Presets write the routing of a paper into a config."""

import pytest
from changed import config

from moe_jax import accounts, assembly
from moe_jax.assembly.experts import experts_a_token, routed_experts
from moe_jax.assembly.sections import NEUTRAL
from moe_jax.errors import ConfigError
from moe_jax.routing import ROUTERS

pytestmark = pytest.mark.unit

OF_SIZE = {
  "num_experts",
  "first",
  "every",
  "d_ff",
  "dense_layers",
  "activation",
  "expert_bias",
  "hash_layers",
  "latent_width",
  "extra_ffn",
  "router",
  "dispatcher",
  "group_size",
  "group_rows",
  "replay_gate",
  "allow_noncausal_routing",
}


def preset(name, changes=()):
  c = config(changes)
  assembly.use_preset(c, name)
  return c


def test_every_router_has_a_preset():
  # Catches a router that cannot be chosen by its paper.
  assert {router for router, _, _ in assembly.PRESETS.values()} == set(ROUTERS)


def test_a_preset_says_everything():
  # Catches a new key of model.moe whose value a preset would inherit from the config to which it is
  # applied.
  moe = config().model.moe
  keys = set(moe) - {"balancing"} | {f"balancing.{name}" for name in moe.balancing}
  assert keys == set(NEUTRAL) | OF_SIZE
  for router, options, said in assembly.PRESETS.values():
    assert set(said) <= set(NEUTRAL) | {"num_experts"} and set(options) <= set(
      config().model.moe.router[router]
    )


@pytest.mark.parametrize("name", assembly.PRESETS)
def test_presets_are_valid_or_refused_for_looking_ahead(name):
  # Catches an option that does not suit the paper's number of experts, and a silent leak of later
  # tokens.
  c = preset(name)
  router, options, keys = assembly.PRESETS[name]
  try:
    assembly.validate(c)
    assert accounts.routing_summary(c).count("NOT causal") == 0
  except ConfigError as error:
    assert "causal" in str(error)
    c.model.moe.allow_noncausal_routing = True
    assembly.validate(c)
  e = c.model.moe
  assert {key: e[key] for key in NEUTRAL} == dict(NEUTRAL) | {
    k: v for k, v in keys.items() if k != "num_experts"
  }
  assert e.router["name"] == router and {o: e.router[router][o] for o in options} == dict(options)


def test_nothing_is_inherited():
  # Catches gates, jitter and capacity of Switch that remain in Mixtral.
  first = preset("mixtral", {"model.moe.jitter": 0.1, "model.moe.router.top_k.priority": "token"})
  again = preset("switch")
  assembly.use_preset(again, "mixtral")
  assert again.model.moe.to_dict() | {"d_ff": 0} == first.model.moe.to_dict() | {"d_ff": 0}


def test_a_token_meets_as_many_hidden_units_as_before():
  # The base config has top-2 routing with experts of width 512, which makes 1024. Catches presets
  # with other activated FLOPs, and shared experts that do not count.
  for name in assembly.PRESETS:
    c = preset(name)
    e = c.model.moe
    met = e.d_ff * (experts_a_token(c.model, c.data.seq_len) + e.num_shared_experts)
    assert met == pytest.approx(1024, rel=0.02), name
  assert preset("dbrx").model.moe.d_ff == 256 and preset("deepseek_moe").model.moe.d_ff == 128


def test_by_the_papers():
  # These values are easy to get wrong by a factor; see the comments in presets.py.
  assert preset("mixtral").model.moe.balance_loss == pytest.approx(0.04)
  # GShard has 2N/(G E) slots.
  assert preset("gshard").model.moe.capacity_basis == "assignments"
  assert preset("deepseek_v3").model.moe.router.sigmoid_bias.to_dict() == {
    "k": 8,
    "groups": 8,
    "kept_groups": 4,
    "gate_norm": "top_k",
    "priority": "choice",
  }
  assert assembly.loss_weights(preset("deepseek_v2")) == {
    "balance": 0.003,
    "device": 0.05,
    "communication": 0.02,
  }
  # Experts with and without an FFN.
  assert routed_experts(preset("moe_plus_plus").model.moe) == 8 + 4
  assert routed_experts(preset("longcat_flash").model.moe) == 512 + 256
  assert (
    assembly.loss_weights(preset("soft_moe")) == assembly.loss_weights(preset("base_layers")) == {}
  )


def test_unknown_and_dense():
  # Catches a KeyError, and a dense config that silently gets experts.
  with pytest.raises(ConfigError, match="did you mean 'switch'"):
    preset("swich")
  with pytest.raises(ConfigError, match="dense"):
    preset("switch", {"model.moe.num_experts": 0})
