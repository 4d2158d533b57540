"""Checkpoints: bit-exact, the latest and the best kept, half-written ones ignored, damaged ones refused."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.errors import ConfigError
from moe_jax.training import checkpoints
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.state import TrainState

pytestmark = pytest.mark.unit


def make_state(step, sizes=None):
  mesh = sharding.make_mesh(sizes or {"data": 1})
  w = jax.device_put(jnp.arange(16.0).reshape(8, 2) + step, NamedSharding(mesh, PartitionSpec("expert")))
  everywhere = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
  return TrainState(step=everywhere(jnp.int32(step)), params={"layer": {"w": w, "scale": everywhere(jnp.ones(3))}},
                    opt_state=({"mu": w * 2}, ()), router_state={}, rng=everywhere(jax.random.key(step)))


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a, b):
  raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def save(directory, bits, **changes):
  """Saves step n with `bits[n]` (None: not evaluated)."""
  with Checkpoints(directory) as c:
    for step, value in bits.items():
      c.save(step, make_state(step, **changes), {"batches": step}, {"seconds": 0.5}, value)
    c.wait()


def test_restores_every_bit_also_onto_another_mesh(tmp_path):
  # Catches: an item left out (key, optimizer, data); a restore that keeps the saved layout.
  save(tmp_path, {3: 2.0}, sizes={"expert": 4})
  expected = make_state(3, {"data": 2, "expert": 2})
  with Checkpoints(tmp_path) as c:
    state, data, meta = c.restore(abstract(expected))
  same(state, expected)
  assert data == {"batches": 3} and meta == {"seconds": 0.5}
  assert state.params["layer"]["w"].sharding == expected.params["layer"]["w"].sharding


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
  # Catches: a save that reads, in the background, memory that the next steps already write to.
  place = NamedSharding(sharding.make_mesh({"data": 1}), PartitionSpec())
  state = jax.device_put(TrainState(step=jnp.int32(1), params={f"w{i}": jnp.ones((512, 512)) for i in range(16)},
                                    opt_state=(), router_state={}, rng=jax.random.key(0)), place)
  update = jax.jit(lambda s: s.replace(params=jax.tree.map(lambda x: x + 1, s.params)), donate_argnums=0)
  with Checkpoints(tmp_path) as c:
    c.save(1, state, {}, {})
    for _ in range(20):
      state = update(state)
    jax.block_until_ready(state.params)
    restored, *_ = c.restore(abstract(state))
  assert all((np.asarray(w) == 1).all() for w in restored.params.values())


def test_keeps_the_latest_and_the_best(tmp_path):
  # Catches: the newest deleted because two older ones are better; checkpoints without a score kept for ever.
  save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: None})
  assert checkpoints.steps(tmp_path) == [2, 6]


def test_a_step_is_saved_once(tmp_path):
  # Catches: StepAlreadyExistsError when a signal comes at a step that was just saved.
  save(tmp_path, {1: 1.0})
  save(tmp_path, {1: None, 2: None})
  assert checkpoints.steps(tmp_path) == [1, 2]


def test_what_a_killed_save_left_is_removed(tmp_path):
  # Catches: a half-written checkpoint restored, or kept for ever.
  save(tmp_path, {1: 1.0, 2: 0.5})
  shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
  shutil.rmtree(tmp_path / "3.orbax-checkpoint-tmp" / "state")
  assert checkpoints.steps(tmp_path) == [2]
  with Checkpoints(tmp_path) as c:
    assert c.latest_step() == 2
    c.save(3, make_state(3), {}, {}, 0.4)
    c.wait()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["3"]


def test_a_deletion_that_was_killed_does_no_harm(tmp_path):
  # Catches: a run that cannot resume because an old checkpoint, on its way out, has lost its files.
  save(tmp_path, {1: 0.1, 2: 0.5})
  for item in ("state", "metrics"):
    shutil.rmtree(tmp_path / "1" / item)
  with Checkpoints(tmp_path) as c:
    state, *_ = c.restore(abstract(make_state(2)))
    same(state, make_state(2))
    c.save(3, make_state(3), {}, {}, None)
    c.save(4, make_state(4), {}, {}, None)
    c.wait()
  assert checkpoints.steps(tmp_path)[-1] == 4


@pytest.mark.parametrize("damage", ["state/manifest.ocdbt", "state", "data", "data/metadata", "truncated"])
def test_a_damaged_checkpoint_is_told_in_a_sentence(tmp_path, damage):
  # Catches: a traceback from TensorStore; a run that silently starts anew.
  save(tmp_path, {2: 1.0, 4: 2.0})
  if damage == "truncated":
    for file in (tmp_path / "4" / "state").rglob("*"):
      if file.is_file() and "/d/" in str(file):
        file.write_bytes(file.read_bytes()[:10])
  else:
    target = tmp_path / "4" / damage
    shutil.rmtree(target) if target.is_dir() else target.write_bytes(b"")
  told = "delete this directory to go on from step 2"
  with Checkpoints(tmp_path) as c, pytest.raises(ConfigError, match=told) as error:
    c.restore(abstract(make_state(4)))
  assert str(tmp_path / "4") in str(error.value) and "\n" not in str(error.value)


def test_another_models_checkpoint_is_refused(tmp_path):
  # Catches: weights restored into shapes that are not theirs.
  save(tmp_path, {2: 1.0})
  other = abstract(make_state(2))
  w = other.params["layer"]["w"]
  other.params["layer"]["w"] = jax.ShapeDtypeStruct((8, 3), w.dtype, sharding=w.sharding)
  with Checkpoints(tmp_path) as c, pytest.raises(ConfigError, match="not of this model"):
    c.restore(other)


def test_weights_load_without_model_or_mesh_and_hash_alike(tmp_path):
  # Catches: a hash that depends on layout or order, or that misses a flipped bit, a renamed or a reshaped weight.
  save(tmp_path, {2: 1.0}, sizes={"expert": 8})
  loaded = checkpoints.load_params(tmp_path, 2)
  params = make_state(2).params
  digest = checkpoints.parameters_sha256(params)
  assert checkpoints.parameters_sha256(loaded) == digest and checkpoints.count(loaded) == 19
  layer = params["layer"]
  reordered = {"layer": {"scale": layer["scale"], "w": layer["w"]}}
  assert checkpoints.parameters_sha256(reordered) == digest
  for changed in ({"w": layer["w"].at[0, 0].add(1e-6)}, {"v": layer["w"]}, {"w": layer["w"].reshape(4, 4)}):
    assert checkpoints.parameters_sha256({"layer": changed | {"scale": layer["scale"]}}) != digest
