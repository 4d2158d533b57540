"""Tests that each config resolves to its snapshot in `config_snapshots/`, and that it is valid.

The diff of the snapshots shows all configs that a changed default affects. After an intended
change, run `python tests/configs_test.py`, look at the diff, and list the changes under Numerics in
CHANGELOG.
"""

import importlib
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SNAPSHOTS = ROOT / "tests" / "config_snapshots"
# The configs of papers, each of which has a variant "desk".
FAMILIES = (
  "brainformer",
  "dbrx",
  "deepseek_moe",
  "deepseek_v2",
  "deepseek_v3",
  "expert_choice",
  "glam",
  "glm_4_5",
  "gpt_oss",
  "gshard",
  "kimi_k2",
  "lifelong_moe",
  "llama",
  "llama4",
  "llama_moe",
  "longcat_flash",
  "lstm_moe",
  "mixtral",
  "olmoe",
  "qwen1_5_moe",
  "qwen3_moe",
  "qwen2",
  "st_moe",
  "switch",
  "t5",
)
CONFIGS = (
  "base.py",
  "quickstart.py",
  "desk.py",
  "dense_baseline.py:quickstart",
  "dense_baseline.py:desk",
  *(f"{family}.py:desk" for family in FAMILIES),
)
NO_CONFIGS = {"shared.py"}  # helpers that the files of configs/ share

pytestmark = pytest.mark.unit


def resolved(name: str) -> str:
  """Returns a config as JSON."""
  # Imported here because jaxtyping's import hook must come first.
  from moe_jax.commands import load_config

  return json.dumps(load_config(f"configs/{name}").to_dict(), indent=1) + "\n"


def snapshot(name: str) -> pathlib.Path:
  """Returns the path of a config's snapshot."""
  return SNAPSHOTS / (name.replace(".py", "").replace(":", "_") + ".json")


def leaves(values, prefix=""):
  """Returns every dotted key with its value, without the options of routers that are not used."""
  flat = {}
  for key, value in values.items():
    if not isinstance(value, dict):
      flat[prefix + key] = value
    elif "name" not in values or key == values["name"]:
      flat |= leaves(value, f"{prefix}{key}.")
  return flat


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_resolves_as_before(name):
  # Catches a default that is changed for one experiment and silently changes the others. An option
  # that is new since the snapshot must have its default.
  from moe_jax.assembly.sections import find_key

  now, before = leaves(json.loads(resolved(name))), leaves(json.loads(snapshot(name).read_text()))
  assert {key: now[key] for key in before} == before
  for key in now.keys() - before.keys():
    default = find_key(key).default
    assert now[key] == (list(default) if isinstance(default, tuple) else default), key


def test_every_config_has_a_snapshot():
  # Catches a new config file without a snapshot.
  files = {p.name for p in (ROOT / "configs").glob("*.py")} - NO_CONFIGS
  assert files == {name.partition(":")[0] for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid(name):
  # Catches a config whose mistakes only show when somebody runs it.
  from moe_jax import accounts, assembly
  from moe_jax.commands import load_config

  config = load_config(f"configs/{name}")
  assembly.validate(config, 1)
  total, activated = accounts.parameter_counts(config, 364)
  assert 0 < activated <= total


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_is_valid(family):
  # Catches a size of a paper that is not divisible by its own groups, heads or batch.
  from moe_jax import assembly
  from moe_jax.errors import ConfigError

  module = importlib.import_module(f"configs.{family}")
  for variant in module.VARIANTS:
    c = module.get_config(variant)
    assembly.validate(c)
    assert c.paper.name and c.paper.parameters
  # The default is the first variant, which is also the one that "desk" shrinks.
  assert module.get_config() == module.get_config(next(iter(module.VARIANTS)))
  with pytest.raises(ConfigError, match="config='desks': did you mean 'desk'"):
    module.get_config("desks")


@pytest.mark.parametrize("family", FAMILIES)
def test_desk_keeps_the_routing_and_shrinks_the_rest(family):
  # Catches a desk model that routes differently from its paper, that is too large, or whose experts
  # per token are together not as wide as its dense FFN.
  from moe_jax import accounts
  from moe_jax.assembly.experts import experts_a_token

  module = importlib.import_module(f"configs.{family}")
  small, c = module.get_config("desk"), module.get_config()
  size_keys = ("num_experts", "copy_experts", "d_ff", "group_size", "group_rows", "dispatcher")

  def keep(e):
    return {key: value for key, value in e.to_dict().items() if key not in size_keys}

  assert keep(small.model.moe) == keep(c.model.moe)
  for key in (
    "family",
    "position",
    "relative_shared",
    "attention",
    "rope_theta",
    "qkv_bias",
    "qk_norm",
    "qk_norm_over",
    "sinks",
    "global_every",
    "global_positions",
    "clip_qkv",
    "query_scale",
    "activation",
    "norm",
    "norm_eps",
    "embed_scale",
    "tied_embeddings",
  ):
    assert small.model[key] == c.model[key], key
  assert accounts.parameter_counts(small, 364)[0] < 10e6 and small.train.steps == 800
  e = small.model.moe
  if e.num_experts:
    width = e.d_ff * (experts_a_token(small.model, small.data.seq_len) + e.num_shared_experts)
    assert abs(width - small.model.d_ff) < 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_twin_has_the_activated_flops_of_its_family(family):
  # Catches a twin without the shared experts, the extra FFN or the other activation of its family's
  # experts, and a family that has no twin.
  from configs import dense_baseline
  from moe_jax import accounts, assembly

  config = importlib.import_module(f"configs.{family}").get_config("desk")
  if not config.model.moe.num_experts:
    assert family not in dense_baseline.FAMILIES
    return
  twin = dense_baseline.get_config(family)
  assembly.validate(twin, 1)
  total, activated = accounts.parameter_counts(twin, 364)
  assert total == activated
  assert not twin.model.moe.balance_loss and not twin.model.moe.z_loss
  # The twin lacks only the FLOPs of the router.
  assert 0.96 < accounts.flops_per_token(twin, 364) / accounts.flops_per_token(config, 364) <= 1
  differs = {
    key for key, value in config.model.items() if key != "moe" and twin.model[key] != value
  }
  assert not differs and (twin.data, twin.optimizer, twin.train) == (
    config.data,
    config.optimizer,
    config.train,
  )


if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))
  for each in CONFIGS:
    snapshot(each).write_text(resolved(each))
