"""Checkpoints are bit-exact, the latest and the best are kept, and damaged ones are set aside."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.errors import ConfigError, Diverged
from moe_jax.training import checkpoints
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.state import TrainState

pytestmark = pytest.mark.unit


def make_state(step, sizes=None):
  mesh = sharding.make_mesh(sizes or {"data": 1})
  w = jax.device_put(
    jnp.arange(16.0).reshape(8, 2) + step, NamedSharding(mesh, PartitionSpec("expert"))
  )

  def everywhere(x):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

  return TrainState(
    step=everywhere(jnp.int32(step)),
    params={"layer": {"w": w, "scale": everywhere(jnp.ones(3))}},
    opt_state=({"mu": w * 2}, ()),
    router_state={},
    rng=everywhere(jax.random.key(step)),
  )


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a, b):
  def raw(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

  jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def save(directory, bits, keep=(1, 1), **changes):
  """Saves each step n of `bits` with the score `bits[n]`; None means that it was not evaluated."""
  with Checkpoints(directory, *keep) as c:
    for step, value in bits.items():
      c.save(step, make_state(step, **changes), {"batches": step}, {"seconds": 0.5}, value)
    c.wait()


def test_restores_every_bit_also_onto_another_mesh(tmp_path):
  # Catches an item that is left out (key, optimizer, data), and a restore that keeps the sharding
  # of the saved state.
  save(tmp_path, {3: 2.0}, sizes={"expert": 4})
  expected = make_state(3, {"data": 2, "expert": 2})
  with Checkpoints(tmp_path) as c:
    step, state, data, meta, told = c.restore(abstract(expected))
  same(state, expected)
  assert (step, data, meta, told) == (3, {"batches": 3}, {"seconds": 0.5}, [])
  assert state.params["layer"]["w"].sharding == expected.params["layer"]["w"].sharding


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
  # Catches a save that reads memory in the background while the next steps write to it.
  place = NamedSharding(sharding.make_mesh({"data": 1}), PartitionSpec())
  state = jax.device_put(
    TrainState(
      step=jnp.int32(1),
      params={f"w{i}": jnp.ones((512, 512)) for i in range(16)},
      opt_state=(),
      router_state={},
      rng=jax.random.key(0),
    ),
    place,
  )
  update = jax.jit(
    lambda s: s.replace(params=jax.tree.map(lambda x: x + 1, s.params)), donate_argnums=0
  )
  with Checkpoints(tmp_path) as c:
    c.save(1, state, {}, {})
    for _ in range(20):
      state = update(state)
    jax.block_until_ready(state.params)
    restored = c.restore(abstract(state)).state
  assert all((np.asarray(w) == 1).all() for w in restored.params.values())


def test_keeps_the_latest_and_the_best(tmp_path):
  # Catches a newest checkpoint that is deleted because two older ones are better, and checkpoints
  # without a score that are kept for ever.
  save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: None})
  assert checkpoints.steps(tmp_path) == [2, 6]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_ranks_last(tmp_path, score):
  # Catches a NaN that Orbax takes for the best score of all, so that good checkpoints are deleted.
  save(tmp_path, {1: 1.0, 2: 2.0, 3: score, 4: score})
  assert checkpoints.steps(tmp_path) == [1, 4]


def test_as_many_are_kept_as_were_asked_for(tmp_path):
  # Catches keep_last and keep_best that are exchanged or not passed on.
  save(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0, 4: 9.0, 5: 8.0, 6: 7.0}, keep=(3, 2))
  assert checkpoints.steps(tmp_path) == [1, 2, 4, 5, 6]


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
  # Catches ruined weights that are saved in place of good ones, and a moment that is not examined.
  save(tmp_path, {1: 1.0})
  good = make_state(2)
  ruined = good.replace(opt_state=({"mu": good.opt_state[0]["mu"].at[3, 1].set(jnp.inf)}, ()))
  with Checkpoints(tmp_path) as c:
    with pytest.raises(
      Diverged, match="after step 2 opt_state/0/mu is no longer finite.*/1 is from before"
    ):
      c.save(2, ruined, {}, {})
    c.save(3, ruined.replace(step=jnp.int32(3)), {}, {}, require_finite=False)
  assert checkpoints.steps(tmp_path) == [1, 3]


def test_a_step_is_saved_once(tmp_path):
  # Catches a StepAlreadyExistsError when a signal comes at a step that was just saved.
  save(tmp_path, {1: 1.0})
  save(tmp_path, {1: None, 2: None})
  assert checkpoints.steps(tmp_path) == [1, 2]


def test_what_a_killed_save_left_is_removed(tmp_path):
  # Catches a half-written checkpoint that is restored or kept for ever.
  save(tmp_path, {1: 1.0, 2: 0.5})
  shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
  shutil.rmtree(tmp_path / "3.orbax-checkpoint-tmp" / "state")
  assert checkpoints.steps(tmp_path) == [2]
  with Checkpoints(tmp_path) as c:
    assert c.latest_step() == 2
    c.save(3, make_state(3), {}, {}, 0.4)
    c.wait()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["3"]


def test_a_deletion_that_never_began_is_made_up_for(tmp_path):
  # Catches a checkpoint too many for ever: a run was killed between the rename of its last
  # checkpoint and the deletion of an old one, and saves no more. (2 has the best score.)
  save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.6}, keep=(9, 1))
  with Checkpoints(tmp_path, 2, 1) as c:
    assert c.restore(abstract(make_state(5)), before=5).step == 4
    assert c.steps() == [1, 2, 3, 4, 5]  # a rollback may still need any of them
    assert c.restore(abstract(make_state(5))).step == 5
    assert c.steps() == [2, 4, 5]
  assert checkpoints.steps(tmp_path) == [2, 4, 5]


def test_a_deletion_that_was_killed_does_no_harm(tmp_path):
  # Catches a run that cannot resume because an older checkpoint was only partly deleted.
  save(tmp_path, {1: 0.1, 2: 0.5})
  for item in ("state", "metrics"):
    shutil.rmtree(tmp_path / "1" / item)
  with Checkpoints(tmp_path) as c:
    same(c.restore(abstract(make_state(2))).state, make_state(2))
    c.save(3, make_state(3), {}, {}, None)
    c.save(4, make_state(4), {}, {}, None)
    c.wait()
  assert checkpoints.steps(tmp_path)[-1] == 4


def flip(directory):
  """Changes one bit in the middle of the largest file below `directory`."""
  file = max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(bytes(content))


def truncate(directory):
  for file in (directory / "state").rglob("*"):
    if file.is_file() and "/d/" in str(file):
      file.write_bytes(file.read_bytes()[:10])


def forge(directory, item, change):
  file = directory / item / "metadata"
  file.write_text(json.dumps(change(json.loads(file.read_text()))))


DAMAGES = {
  "a bit of an array": lambda c: flip(c / "state" / "d"),
  "truncated": truncate,
  "no manifest": lambda c: (c / "state" / "manifest.ocdbt").write_bytes(b""),
  "no state": lambda c: shutil.rmtree(c / "state"),
  "no data": lambda c: shutil.rmtree(c / "data"),
  "data is no JSON": lambda c: (c / "data" / "metadata").write_bytes(b"\xff{"),
  "another place in the data": lambda c: forge(c, "data", lambda d: {"batches": 2}),
  "data is a list": lambda c: forge(c, "data", lambda d: [1]),
  "another meta": lambda c: forge(c, "meta", lambda m: m | {"meta": {"seconds": 1e9}}),
  "another digest": lambda c: forge(
    c, "meta", lambda m: m | {"digests": m["digests"] | {"step": "0"}}
  ),
  "no seal": lambda c: forge(c, "meta", lambda m: m["meta"]),
  "nested deeply": lambda c: (c / "meta" / "metadata").write_text("[" * 100_000),
  "another step's": lambda c: (shutil.rmtree(c), shutil.copytree(c.with_name("2"), c)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_taken(tmp_path, damage):
  # Catches a flipped bit on which a run silently trains, a traceback of TensorStore, a run that
  # silently begins anew, and a damaged checkpoint that is deleted or that prevents the next save of
  # its step.
  home = tmp_path / "checkpoints"
  save(home, {2: 1.0, 4: 2.0})
  DAMAGES[damage](home / "4")
  with Checkpoints(home) as c:
    step, state, data, _, told = c.restore(abstract(make_state(4)))
    same(state, make_state(2))
    assert (step, data, c.steps()) == (2, {"batches": 2}, [2])
    c.save(4, make_state(4), {"batches": 4}, {})
    c.wait()
    same(c.restore(abstract(make_state(4))).state, make_state(4))
  aside = tmp_path / "set_aside" / "checkpoints-4"
  assert (
    aside.is_dir()
    and len(told) == 1
    and str(aside) in told[0]
    and "\n" not in told[0]
    and "step 2" in told[0]
  )


@pytest.mark.parametrize("note", ["metrics/metrics", "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("content", [b"[]", b'"x"', b"{", b"", b"\xff{}", b"[" * 100_000, None])
def test_damaged_notes_of_orbax_cost_no_checkpoint(tmp_path, note, content):
  # Catches an Orbax manager that cannot even be constructed because one score is damaged.
  home = tmp_path / "checkpoints"
  save(home, {2: 1.0, 4: 2.0})
  path = home / "4" / note
  path.unlink()
  path.mkdir() if content is None else path.write_bytes(content)
  with Checkpoints(home) as c:
    step, state, _, _, told = c.restore(abstract(make_state(4)))
    same(state, make_state(4))
    c.save(6, make_state(6), {"batches": 6}, {}, 3.0)
    c.wait()
    assert c.steps() == [2, 6]
  assert (
    step == 4
    and len(told) == 1
    and str(path) in told[0]
    and list((tmp_path / "set_aside").iterdir())
  )


@pytest.mark.parametrize(
  "field, value",
  [
    ("item_handlers", True),
    ("metrics", [1]),
    ("performance_metrics", "x"),
    ("custom_metadata", False),
    ("init_timestamp_nsecs", "x"),
    ("commit_timestamp_nsecs", {"a": 1}),
  ],
)
def test_an_entry_of_another_type_costs_no_checkpoint(tmp_path, field, value):
  # Catches a note that is JSON, but of which Orbax's manager refuses one entry.
  home = tmp_path / "checkpoints"
  save(home, {2: 1.0, 4: 2.0})
  path = home / "4" / "_CHECKPOINT_METADATA"
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with Checkpoints(home) as c:
    step, _, _, _, told = c.restore(abstract(make_state(4)))
  assert step == 4 and len(told) == 1 and str(path) in told[0]


def test_where_no_checkpoint_is_whole_nothing_changes(tmp_path):
  # Catches the last copy of the weights that is moved or deleted, and a run that silently begins
  # anew.
  home = tmp_path / "checkpoints"
  save(home, {2: 1.0, 4: 2.0})
  for step in (2, 4):
    flip(home / str(step) / "state" / "d")
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  with (
    Checkpoints(home) as c,
    pytest.raises(ConfigError, match="nothing was changed; restore this directory") as error,
  ):
    c.restore(abstract(make_state(4)))
  assert str(home / "4") in str(error.value) and "\n" not in str(error.value)
  assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_run_that_goes_back_sets_later_checkpoints_aside(tmp_path):
  # Catches a step that is not saved again because it has a checkpoint already, and an unhealthy
  # checkpoint that is restored.
  home = tmp_path / "checkpoints"
  save(home, {2: 1.0, 4: 2.0, 6: 3.0}, keep=(3, 1))
  with Checkpoints(home, 3) as c:
    assert c.restore(abstract(make_state(6)), before=6).step == 4
    c.drop_after(4)
    assert c.steps() == [2, 4]
  assert [p.name for p in (tmp_path / "set_aside").iterdir()] == ["checkpoints-6"]


def test_another_models_checkpoint_is_refused(tmp_path):
  # Catches weights that are restored into other shapes.
  save(tmp_path, {2: 1.0})
  other = abstract(make_state(2))
  w = other.params["layer"]["w"]
  other.params["layer"]["w"] = jax.ShapeDtypeStruct((8, 3), w.dtype, sharding=w.sharding)
  with Checkpoints(tmp_path) as c, pytest.raises(ConfigError, match="of another model"):
    c.restore(other)


def test_a_state_that_is_not_what_its_digests_say_is_not_restored(tmp_path, monkeypatch):
  # The storage's own checksums do not detect this damage. Catches digests that are written but
  # never compared.
  save(tmp_path, {2: 2.0})
  true = checkpoints.digest.examine

  def other(tree):
    found = true(tree)
    return found._replace(digests=found.digests | {"params/layer/w": "0" * 32})

  monkeypatch.setattr(checkpoints.digest, "examine", other)
  with Checkpoints(tmp_path) as c, pytest.raises(ConfigError, match="params/layer/w"):
    c.restore(abstract(make_state(2)))


def test_what_is_set_aside_again_gets_another_name(tmp_path):
  # Catches a damaged checkpoint that overwrites one that was set aside earlier.
  names = []
  for _ in range(3):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    names.append(
      checkpoints._move_aside(tmp_path / "checkpoints", tmp_path / "checkpoints" / "5", "5").name
    )
  assert names == ["checkpoints-5", "checkpoints-5-2", "checkpoints-5-3"]


def test_weights_that_have_changed_do_not_load(tmp_path):
  # Catches an `inspect` that prints a fingerprint of damaged weights as if they were the run's.
  save(tmp_path, {2: 1.0})
  flip(tmp_path / "2" / "state" / "d")
  with pytest.raises(ConfigError, match="has changed|cannot be read"):
    checkpoints.load_params(tmp_path, 2)


def test_weights_load_without_model_or_mesh_and_hash_alike(tmp_path):
  # Catches a hash that depends on the sharding or the order of the weights, or that does not depend
  # on a number, a name or a shape.
  save(tmp_path, {2: 1.0}, sizes={"expert": 8})
  loaded = checkpoints.load_params(tmp_path, 2)
  params = make_state(2).params
  digest = checkpoints.parameters_sha256(params)
  assert checkpoints.parameters_sha256(loaded) == digest and checkpoints.count(loaded) == 19
  layer = params["layer"]
  reordered = {"layer": {"scale": layer["scale"], "w": layer["w"]}}
  assert checkpoints.parameters_sha256(reordered) == digest
  for changed in (
    {"w": layer["w"].at[0, 0].add(1e-6)},
    {"v": layer["w"]},
    {"w": layer["w"].reshape(4, 4)},
  ):
    assert checkpoints.parameters_sha256({"layer": changed | {"scale": layer["scale"]}}) != digest


def test_arrays_are_listed_with_their_verb():
  # Catches a wrong number, and a plural of one array.
  assert checkpoints._listed(["a"]) == "a is"
  assert checkpoints._listed(["a", "b"]) == "a and b are"
  assert checkpoints._listed(["a", "b", "c"]) == "a and 2 more arrays are"


def test_a_seal_does_not_depend_on_the_order_of_keys():
  # Catches a checkpoint that is taken for damaged because its JSON was written in another order.
  assert checkpoints._seal(3, {"a": 1, "b": 2}) == checkpoints._seal(3, {"b": 2, "a": 1})
  assert checkpoints._seal(3, {"a": 1}) != checkpoints._seal(4, {"a": 1})
