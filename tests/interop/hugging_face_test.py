"""Tests workdirs that are made of published checkpoints, and checkpoints made of workdirs."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from interop import checkpoints
from safetensors.numpy import load_file

import moe_jax
from moe_jax import assembly, sharding, train
from moe_jax.errors import ConfigError
from moe_jax.interop import hugging_face
from moe_jax.training import optimizers, workdir
from moe_jax.training import state as states
from moe_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.unit


def published(tmp_path, family, dtype=np.float32, **changes):
  """Returns the folder of a checkpoint, whose config.json has these changes, and its tensors."""
  values = checkpoints.tensors(family, dtype)
  settings = checkpoints.config(family, **{"torch_dtype": np.dtype(dtype).name} | changes)
  return checkpoints.write(tmp_path / "published", values, settings), values


@pytest.mark.parametrize(
  "family, dtype", [("mixtral", ml_dtypes.bfloat16), ("qwen2_moe", np.float32)]
)
def test_there_and_back_is_the_identity(tmp_path, family, dtype):
  # Catches a dtype that is changed, a tensor that is lost, and a config.json that transformers
  # would read as another model.
  folder, values = published(tmp_path, family, dtype, bos_token_id=1)
  moe_jax.from_hugging_face(folder, tmp_path / "run")
  run = moe_jax.load_run(tmp_path / "run")
  assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(run.variables))
  assert run.config.model.dtype == np.dtype(dtype).name
  moe_jax.to_hugging_face(tmp_path / "run", tmp_path / "back")
  back = load_file(tmp_path / "back" / "model.safetensors")
  assert back.keys() == values.keys()
  for name, value in values.items():
    assert back[name].dtype == value.dtype and back[name].shape == value.shape
    assert back[name].tobytes() == value.tobytes(), name
  settings = json.loads((tmp_path / "back" / "config.json").read_text())
  wanted = checkpoints.config(family, bos_token_id=1, torch_dtype=np.dtype(dtype).name)
  assert settings["bos_token_id"] == 1 and settings["torch_dtype"] == wanted["torch_dtype"]
  assert hugging_face.keys(settings)[1] == hugging_face.keys(wanted)[1]


def test_a_run_begins_with_the_weights(tmp_path):
  # Catches an optimizer's state that is required of published weights, weights that are trained in
  # the dtype in which they were published, and a place in the data that is required.
  folder, _ = published(tmp_path, "llama", ml_dtypes.bfloat16)
  place = tmp_path / "run"
  config = moe_jax.from_hugging_face(folder, place)
  before = moe_jax.load_run(place).variables["params"]
  mesh = sharding.make_mesh({"fsdp": 4})
  model = assembly.model(config, checkpoints.V, mesh)
  optimizer, _ = optimizers.make(optimizers.OptimizerOptions.of(config.optimizer), 5)
  abstract, _ = states.create(mesh, model, optimizer, 0, 8, 4)
  with Checkpoints(place / "checkpoints") as saved:
    saved.begin = functools.partial(states.begin, abstract, optimizer, 0)
    restored = saved.restore(abstract)
  assert restored.step == 0 and not restored.data
  for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(abstract), strict=True):
    assert leaf.dtype == wanted.dtype and leaf.sharding == wanted.sharding
  for leaf, wanted in zip(
    jax.tree.leaves(restored.state.params), jax.tree.leaves(before), strict=True
  ):
    np.testing.assert_array_equal(leaf, wanted.astype(np.float32))


@pytest.mark.every_variant
def test_training_goes_on_from_the_weights(tmp_path):
  # Catches a run that begins with random weights, and imported weights that are deleted once a
  # checkpoint is saved.
  folder, _ = published(tmp_path, "llama", ml_dtypes.bfloat16)
  place = tmp_path / "run"
  moe_jax.from_hugging_face(folder, place)
  before = moe_jax.load_run(place).variables["params"]["embedding"]
  keys = ("data", "train", "mesh")
  flags = [
    f"--config.{key}={value}"
    for key, value in tiny.overrides(tmp_path, train__steps=2).items()
    if key.startswith(keys)
  ]
  arguments = ["train", f"--config={place}/config.py", f"--workdir={place}", *flags]
  # Such a learning rate leaves the weights as they were.
  still = ["--config.optimizer.learning_rate=1e-30", "--config.optimizer.warmup_steps=0"]
  assert train.main([*arguments, *still]) == 0
  after = moe_jax.load_run(place).variables["params"]["embedding"]
  assert after.dtype == np.float32
  np.testing.assert_array_equal(after, before.astype(np.float32))
  assert moe_jax.load_run(place, 0).variables["params"]["embedding"].dtype == ml_dtypes.bfloat16
  # From now on this is a run like any other, whose training must not change.
  config = moe_jax.load_run(place).config
  config.optimizer.learning_rate = 0.5
  with pytest.raises(ConfigError, match="optimizer.learning_rate"):
    workdir.check(place, config)


def test_another_model_cannot_train_on_imported_weights(tmp_path):
  # Catches a model that is changed by a flag, with which the weights would mean something else.
  folder, _ = published(tmp_path, "llama")
  config = moe_jax.from_hugging_face(folder, tmp_path / "run")
  config.train.steps, config.optimizer.learning_rate = 7, 0.5
  workdir.check(tmp_path / "run", config)
  config.model.rope_theta = 5.0
  with pytest.raises(ConfigError, match=r"has model\.rope_theta=10000\.0"):
    workdir.check(tmp_path / "run", config)


def test_a_run_of_ours_becomes_a_published_model(tmp_path):
  # Catches a family that is chosen although it computes something else.
  config = tiny.config(
    tmp_path,
    model__embed_scale=False,
    model__norm_eps=1e-5,
    model__moe__every=1,
    model__num_layers=2,
    model__vocab_size=264,
  )
  model = assembly.model(config, 264, sharding.make_mesh({"data": 1}))
  ids = jnp.zeros((1, 4), jnp.int32)
  params = tiny.weights(model, ids, ids, ids)["params"]
  place = tmp_path / "run"
  workdir.claim(place, config)
  with Checkpoints(place / "checkpoints") as saved:
    saved.save_imported(params, {}, {})
  moe_jax.to_hugging_face(place, tmp_path / "out")
  settings = json.loads((tmp_path / "out" / "config.json").read_text())
  assert settings["model_type"] == "mixtral" and settings["tie_word_embeddings"]
  moe_jax.from_hugging_face(tmp_path / "out", tmp_path / "again")
  again = moe_jax.load_run(tmp_path / "again").variables["params"]
  jax.tree.map(np.testing.assert_array_equal, again, params)
  config.model.embed_scale = True
  with pytest.raises(
    ConfigError, match="no published family has this model; mixtral has model.emb"
  ):
    hugging_face.settings_of(config, {})
  config.model.embed_scale = False
  config.model.moe.copy_experts = 2
  # Catches a router with columns of experts that the family does not have.
  with pytest.raises(ConfigError, match="no published family has this model"):
    hugging_face.settings_of(config, {})


def test_tokenizers_come_along(tmp_path):
  # Catches documents that end with their start, a token that is an object, and a path into the
  # temporary folder.
  folder, _ = published(tmp_path, "llama")
  (folder / "tokenizer.json").write_text("{}")
  tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
  (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
  config = moe_jax.from_hugging_face(folder, tmp_path / "run")
  kept = tmp_path / "run" / hugging_face.KEPT
  assert config.data.tokenizer == f"hf:{kept / 'tokenizer.json'}" and kept.is_dir()
  assert (config.data.bos, config.data.eos) == ("<s>", "</s>")
  moe_jax.to_hugging_face(tmp_path / "run", tmp_path / "back")
  assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()) == tokens


@pytest.mark.parametrize(
  "change, words",
  [
    ({"model_type": "gpt2"}, "model_type='gpt2': .*known: llama"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "must be 'LlamaForCausalLM'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope' must be"),
    ({"torch_dtype": "int8"}, "torch_dtype='int8' must be one of"),
    ({"num_key_value_heads": 3}, "model.num_kv_heads=3: must divide"),
    ({"surprise": 1}, "surprise=1 is not known here"),
  ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, change, words):
  # Catches a model that is imported as another one, and a folder that is left half-made.
  folder, _ = published(tmp_path, "llama", **change)
  with pytest.raises(ConfigError, match=words):
    moe_jax.from_hugging_face(folder, tmp_path / "run")
  assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_nothing_half_imported_is_left(tmp_path, monkeypatch):
  # Catches a workdir that appears before it is complete, and one that is overwritten.
  folder, _ = published(tmp_path, "llama")

  def fail(self, reader):
    raise KeyboardInterrupt

  monkeypatch.setattr(hugging_face.Bridge, "load", fail)
  with pytest.raises(KeyboardInterrupt):
    moe_jax.from_hugging_face(folder, tmp_path / "run")
  assert [path.name for path in tmp_path.iterdir()] == ["published"]
  with pytest.raises(ConfigError, match="exists; name a folder that is not there"):
    moe_jax.from_hugging_face(folder, folder)
