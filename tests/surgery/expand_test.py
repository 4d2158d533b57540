import jax
import numpy as np
import pytest
from surgery import models

from moe_jax.errors import ConfigError
from moe_jax.surgery import expand

pytestmark = pytest.mark.numerics

OLD = {
  "model__moe__num_experts": 4,
  "model__moe__balancing__rule": "sign",
  "model__moe__balancing__rate": 0.001,
}
# A vector of the router, of which each expert has an entry, is as long as there are experts.
VECTORS = {"model__moe__router_bias": True, "model__moe__expert_scale": True}
NEW = OLD | {"model__moe__num_experts": 6}


@pytest.mark.parametrize("dispatcher", ["grouped", "einsum"])
def test_without_the_new_experts_nothing_changes(dispatcher, tmp_path):
  # Catches old experts, old columns of the router or old biases that move to other places. The new
  # experts are forbidden by the balancing bias, by which a router chooses.
  changes = {
    "model__moe__router__name": "sigmoid_bias",
    "model__moe__router__sigmoid_bias__k": 2,
    "model__moe__dispatcher__name": dispatcher,
  }
  old = models.Model(models.config(tmp_path, **OLD | changes))
  new = models.Model(models.config(tmp_path, **NEW | changes), seed=1)
  made = expand(old.weights, new.weights)
  for layer in (0, 1):
    name = f"layer_{layer}/balancing_bias"
    made[name] = np.where(np.arange(6) < 4, made[name], -1e3).astype(np.float32)
  after, before = new.logits(made), old.logits()
  if dispatcher == "grouped":
    assert np.array_equal(after, before)
  else:
    # This dispatcher sums over all experts, and a longer sum may round differently.
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("source", ["copy", "fresh"])
def test_what_new_experts_begin_as(tmp_path, source):
  # Catches new experts that are all copies of one, and new columns of the router that are copies,
  # by which a new expert could never be told from its parent.
  options = OLD | VECTORS
  old = models.Model(models.config(tmp_path, **options)).weights
  new = models.Model(models.config(tmp_path, **options | {"model__moe__num_experts": 12}), seed=1)
  made = expand(old, new.weights, source=source)
  before, after = old["layer_1/ffn/up"], made["layer_1/ffn/up"]
  assert np.array_equal(after[:4], before)
  parents = [[np.array_equal(one, parent) for parent in before] for one in after[4:]]
  assert all(map(any, parents)) == (source == "copy") and (
    source == "copy" or not any(map(any, parents))
  )
  if source == "copy":
    assert len({row.index(True) for row in parents}) > 1
  router = made["layer_1/ffn/router"]
  assert np.array_equal(router[:, :4], old["layer_1/ffn/router"])
  assert np.array_equal(router[:, 4:], new.weights["layer_1/ffn/router"][:, 4:])
  for name in ("layer_1/ffn/router_bias", "layer_1/ffn/router_gate_scale"):
    assert np.array_equal(made[name], np.concatenate([old[name], new.weights[name][4:]]))


def test_experts_without_an_ffn_stay_last(tmp_path):
  # With 2 copy and 1 constant expert, the columns of the router and the biases are those of 4
  # experts, 2 new ones and 3 without an FFN. Catches new columns behind them.
  free = {"model__moe__copy_experts": 2, "model__moe__constant_experts": 1}
  old = models.Model(models.config(tmp_path, **OLD | free))
  new = models.Model(models.config(tmp_path, **NEW | free), seed=1)
  made = expand(old.weights, new.weights)
  for name in ("layer_1/ffn/router", "layer_1/balancing_bias"):
    before, drawn = old.weights[name], new.weights[name]
    expected = [before[..., :4], drawn[..., 4:6], before[..., 4:]]
    assert np.array_equal(made[name], np.concatenate(expected, axis=-1))
  for name in ("layer_1/ffn/constant_mix", "layer_1/ffn/constant_vectors"):
    assert np.array_equal(made[name], old.weights[name])


def test_wrong_expansions_are_refused(tmp_path):
  # Catches experts that are lost, and a router whose old logits would change.
  def weights(**changes):
    return models.Model(models.config(tmp_path, **changes)).weights

  old = weights(**OLD)
  with pytest.raises(ConfigError, match="has 4 experts already; set .*num_experts=8"):
    expand(old, old)
  with pytest.raises(ConfigError, match="has no layer with experts"):
    expand(weights(), weights())
  tanh = {"model__moe__gate_network": "tanh"}
  with pytest.raises(ConfigError, match="gate_network='tanh'"):
    expand(weights(**OLD | tanh), weights(**NEW | tanh))
  with pytest.raises(ConfigError, match="source='luck'"):
    expand(old, weights(**NEW), source="luck")


def test_frozen_experts_do_not_move(tmp_path):
  # Catches weight decay or momentum that moves a frozen expert, frozen columns on another axis, and
  # an option that freezes everything.
  import optax

  from moe_jax.training import optimizers

  model = models.Model(models.config(tmp_path, **OLD | VECTORS))
  from moe_jax.surgery.weights import roll, unroll

  params = jax.tree.map(jax.numpy.asarray, roll(model.weights, model.leaves)["params"])
  options = optimizers.OptimizerOptions(freeze_experts=3, learning_rate=0.1, warmup_steps=0)
  optimizer, _ = optimizers.make(options, 10)
  state, moved = optimizer.init(params), params
  for step in range(3):
    gradients = jax.tree.map(lambda leaf, step=step: jax.numpy.sin(leaf + step), moved)
    updates, state = optimizer.update(gradients, state, moved)
    moved = optax.apply_updates(moved, updates)
  leaves = [leaf for leaf in model.leaves if leaf.path[0] == "params"]
  before, after = (unroll({"params": tree}, leaves) for tree in (params, moved))
  for name in before:
    same = before[name] == after[name]
    if name.endswith("ffn/router"):
      assert same[:, :3].all() and not same[:, 3:].any()
    elif "/ffn/" in name:
      assert same[:3].all() and not same[3:].any(), name
    else:
      assert not same.all(), name
  with pytest.raises(ConfigError, match="freeze_experts=4: must be below the number of experts, 4"):
    optimizers.check_free_experts(4, 4)
  optimizers.check_free_experts(3, 4)
  optimizers.check_free_experts(0, 0)
