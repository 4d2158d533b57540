"""The state before the first step is a pure function of the seed, and is sharded over the mesh."""

import jax
import numpy as np
import pytest
import tiny

from moe_jax import assembly, sharding
from moe_jax.training import optimizers
from moe_jax.training import state as states

pytestmark = pytest.mark.unit


def make(tmp_path, sizes, **changes):
  config = tiny.config(tmp_path, **changes)
  mesh = sharding.make_mesh(sizes)
  model = assembly.model(config, 264, mesh)
  optimizer, _ = optimizers.make(optimizers.OptimizerOptions.of(config.optimizer), 6)
  with jax.set_mesh(mesh):
    return states.create(mesh, model, optimizer, config.seed, config.data.seq_len, 8), (
      mesh,
      model,
      optimizer,
      config,
    )


def test_factors_lie_like_what_is_left_of_their_weights(tmp_path):
  # Adafactor keeps a row and a column of each matrix of at least 128 x 128. Catches factors that
  # are replicated on every device (which takes gigabytes with many experts), or that are split
  # along the dimension that they do not have.
  (abstract, _), _ = make(
    tmp_path,
    {"expert": 2, "tensor": 2},
    optimizer__name="adafactor",
    model__d_model=128,
    model__moe__d_ff=256,
  )
  path = "['layer_0']['ffn']['up']"
  specs = {
    jax.tree_util.keystr(p): x.sharding.spec
    for p, x in jax.tree_util.tree_leaves_with_path(abstract.opt_state)
  }
  row, col = (
    next(spec for key, spec in specs.items() if key.endswith(f"{slot}{path}"))
    for slot in ("v_row", "v_col")
  )
  # Of the weight [.., E, D, F] the row keeps D, and the column keeps F.
  assert row[-2:] == ("expert", None) and col[-2:] == ("expert", "tensor")


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_moments_lie_like_their_weights(tmp_path, name):
  # Catches optimizer states that are replicated on every device, although they take the larger part
  # of a big run's memory.
  (abstract, _), (mesh, *_) = make(tmp_path, {"data": 2, "expert": 4}, optimizer__name=name)
  weights = {
    jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(abstract.params)
  }
  split = [name for name, x in weights.items() if "expert" in str(x.sharding.spec)]
  assert split
  moments = jax.tree_util.tree_leaves_with_path(abstract.opt_state)
  same = [
    x
    for p, x in moments
    for n in split
    if jax.tree_util.keystr(p).endswith(n) and x.shape == weights[n].shape
  ]
  assert len(same) >= len(split) and all("expert" in str(x.sharding.spec) for x in same)
  assert all(x.sharding is not None for x in jax.tree.leaves(abstract))


def test_the_same_seed_gives_the_same_state_on_any_mesh(tmp_path):
  # Catches weights that depend on their sharding, a seed that is not used, and weights that are
  # still in Flax's boxes.
  (abstract, draw), (_, model, optimizer, config) = make(tmp_path, {"data": 1})
  (_, draw8), _ = make(tmp_path, {"data": 2, "fsdp": 2, "expert": 2})
  one, eight = draw().params, draw8().params

  def embed(key):
    return states.init_state(model, optimizer, key, config.data.seq_len).params["embedding"]

  another = tiny.quick_jit(embed)(jax.random.key(1))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, eight)
  assert not np.array_equal(one["embedding"], another)
  assert jax.tree.structure(one) == jax.tree.structure(abstract.params)


def test_init_can_be_mapped_over_seeds(tmp_path):
  # Catches an initialisation that needs a concrete key.
  _, (mesh, model, optimizer, config) = make(tmp_path, {"data": 1})
  keys = jax.vmap(jax.random.key)(np.arange(3))
  many = jax.eval_shape(
    jax.vmap(lambda key: states.init_state(model, optimizer, key, config.data.seq_len)), keys
  )
  assert many.params["embedding"].shape[0] == 3
