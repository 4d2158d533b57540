import numpy as np
import pytest
from surgery import models

from moe_jax.errors import ConfigError
from moe_jax.surgery import upcycle

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize(
  "changes",
  [
    {"model__moe__num_experts": 4},
    # Four shards of 8 hidden units, in groups of four experts: a token visits whole groups.
    {
      "model__moe__num_experts": 8,
      "model__moe__d_ff": 8,
      "model__moe__router__top_k__k": 4,
      "model__moe__routed_scale": 4.0,
      "model__scan_layers": False,
    },
    {"model__moe__num_experts": 4, "model__moe__first": 1, "model__activation": "gelu"},
  ],
  ids=["copy", "granular", "every other layer"],
)
def test_the_sparse_model_computes_what_the_dense_one_does(tmp_path, changes):
  # Catches experts of other hidden units, weights that are not kept, and groups of experts whose
  # columns of the router differ.
  dense = models.Model(
    models.config(tmp_path, **{k: v for k, v in changes.items() if k == "model__activation"})
  )
  sparse = models.Model(models.config(tmp_path, **changes), seed=1)
  made = upcycle(dense.weights, sparse.weights)
  np.testing.assert_allclose(sparse.logits(made), dense.logits(), rtol=1e-4, atol=1e-5)
  assert np.array_equal(
    made["layer_1/ffn/router"][:, 0], sparse.weights["layer_1/ffn/router"][:, 0]
  )


def test_experts_without_an_ffn_are_drawn(tmp_path):
  # Four shards in groups of four experts, and a copy and a constant expert. Catches columns of
  # experts without an FFN that are copies, and groups of experts with different columns.
  sparse = models.Model(
    models.config(
      tmp_path,
      model__moe__num_experts=8,
      model__moe__d_ff=8,
      model__moe__copy_experts=1,
      model__moe__constant_experts=1,
    )
  ).weights
  made = upcycle(models.Model(models.config(tmp_path)).weights, sparse)
  router, drawn = made["layer_1/ffn/router"], sparse["layer_1/ffn/router"]
  assert np.array_equal(router[:, 8:], drawn[:, 8:])
  assert all(np.array_equal(router[:, e], drawn[:, e - e % 4]) for e in range(8))
  assert "layer_1/ffn/constant_mix" in made


def test_an_encoder_decoder(tmp_path):
  # Catches stacks that are mixed up: the names of the weights are enough to see it.
  changes = dict(
    model__family="encoder_decoder",
    model__position="relative",
    data__objective="span_corruption",
    data__encoder_len=32,
  )
  from moe_jax import assembly, sharding
  from moe_jax.interop import unrolled

  mesh = sharding.make_mesh(models.MESH)

  def weights(**more):
    config = models.config(tmp_path, **changes, **more)
    assembly.validate(config)
    found = unrolled.leaves(config, models.V, mesh)
    names = [(name, leaf.each) for leaf in found for name in leaf.names]
    return {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(names)}

  dense, sparse = weights(), weights(model__moe__num_experts=4)
  made = upcycle(dense, sparse)
  for stack in ("encoder", "decoder"):
    name = f"{stack}/layer_0/ffn/up"
    assert made[name].shape == sparse[name].shape and (made[name] == dense[name]).all()


def test_a_share_of_the_units_is_drawn_anew():
  # Catches a share of weights instead of units, units that differ between the matrices of an
  # expert, the same units in all experts, and draws of another scale.
  rng = np.random.default_rng(0)
  d, f, e = 64, 40, 4
  dense = {
    "layer_0/ffn/up": rng.normal(1, 2, (d, f)),
    "layer_0/ffn/gate": rng.normal(-1, 3, (d, f)),
    "layer_0/ffn/down": rng.normal(0, 0.5, (f, d)),
  }
  sparse = {name: np.zeros((e, *array.shape)) for name, array in dense.items()}
  made = upcycle(dense, sparse, drop=0.25)
  changed = {}
  for name, array in dense.items():
    differs = (made[name] != array).any(axis=1 if name.endswith(("up", "gate")) else 2)
    changed[name] = differs
    units = (lambda m: m) if name.endswith("down") else (lambda m: m.T)
    drawn = np.concatenate([units(made[name][i])[differs[i]].ravel() for i in range(e)])
    assert abs(drawn.mean() - array.mean()) < 0.2 * array.std()
    assert 0.9 < drawn.std() / array.std() < 1.1
  up, gate, down = changed.values()
  assert (up.sum(axis=1) == 10).all()
  assert np.array_equal(up, gate) and np.array_equal(up, down)
  assert not np.array_equal(up[0], up[1])
  assert upcycle(dense, sparse, drop=0.0)["layer_0/ffn/up"].std(axis=0).max() == 0


def test_widths_that_do_not_fit_are_refused(tmp_path):
  # Catches an expert with a part of a shard, and a share that is no share.
  dense = models.Model(models.config(tmp_path)).weights

  def sparse(**changes):
    return models.Model(models.config(tmp_path, **changes)).weights

  with pytest.raises(ConfigError, match="d_ff=12: must divide the 32 hidden units"):
    upcycle(dense, sparse(model__moe__num_experts=4, model__moe__d_ff=12))
  with pytest.raises(ConfigError, match="num_experts=6: must be a multiple of the 4 shards.*=8"):
    upcycle(dense, sparse(model__moe__num_experts=6, model__moe__d_ff=8))
  with pytest.raises(ConfigError, match="drop=1"):
    upcycle(dense, sparse(model__moe__num_experts=4), drop=1.0)
