"""Tests that weights find their places on a mesh, and what is said of tensors that do not fit."""

import jax
import numpy as np
import pytest
from interop import checkpoints
from interop.checkpoints import LAYERS, E

from moe_jax import sharding
from moe_jax.errors import ConfigError
from moe_jax.interop import hugging_face

pytestmark = pytest.mark.unit


def load(folder, mesh):
  published = hugging_face.read(folder)
  return hugging_face.load(published, hugging_face.config_of(published), sharding.make_mesh(mesh))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
  values = checkpoints.tensors("mixtral")
  folder = tmp_path_factory.mktemp("mixtral") / "checkpoint"
  return values, checkpoints.write(folder, values, checkpoints.config("mixtral"), files=2)


def test_each_weight_is_where_it_belongs(mixtral):
  # Catches experts or layers in the wrong order, w1 and w3 exchanged, and a matrix that is not
  # transposed.
  values, folder = mixtral
  params = load(folder, {"data": 1})["params"]
  layer = params["repeats"]["layer_0"]
  for i in range(LAYERS):
    name = f"model.layers.{i}."
    for e in range(E):
      for theirs, ours in {"w1": "gate", "w3": "up", "w2": "down"}.items():
        np.testing.assert_array_equal(
          layer["ffn"][ours][i, e], values[f"{name}block_sparse_moe.experts.{e}.{theirs}.weight"].T
        )
    query = np.asarray(layer["attention"]["query"][i])
    theirs = values[f"{name}self_attn.q_proj.weight"]
    np.testing.assert_array_equal(query.reshape(query.shape[0], -1).T, theirs)
    scale = layer["attention_norm"]["scale"][i]
    np.testing.assert_array_equal(scale, values[f"{name}input_layernorm.weight"])
  np.testing.assert_array_equal(params["head"], values["lm_head.weight"].T)


def test_a_device_holds_its_shard_alone(mixtral):
  # Catches a weight that every device holds, and a shard of other experts.
  _, folder = mixtral
  whole, split = load(folder, {"data": 1}), load(folder, {"expert": 4, "tensor": 2})
  jax.tree.map(np.testing.assert_array_equal, whole, split)
  up = split["params"]["repeats"]["layer_0"]["ffn"]["up"]
  assert {shard.data.shape for shard in up.addressable_shards} == {(LAYERS, 1, 16, 4)}
  assert len(up.addressable_shards) == 8


def test_what_does_not_fit_is_listed(tmp_path):
  # Catches a tensor that is silently left out, a missing one that is found only when everything
  # else has been read, and a transposed one that is reshaped.
  values = checkpoints.tensors("llama")
  del values["model.norm.weight"]
  values["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
  # The tables of the rotary embedding are ignored by name.
  values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
  name = "model.layers.1.mlp.up_proj.weight"
  values[name] = values[name].T.copy()
  folder = checkpoints.write(tmp_path / "folder", values, checkpoints.config("llama"))
  with pytest.raises(ConfigError) as caught:
    load(folder, {"data": 1})
  assert caught.value.remedy == (
    "model.layers.0.self_attn.q_proj.bias is not a tensor of this model; "
    "model.layers.1.mlp.up_proj.weight has the shape (16, 24) and must have (24, 16); "
    "model.norm.weight is missing"
  )
