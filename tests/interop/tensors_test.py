"""Tests reading and writing folders of safetensors, and what is said of damaged ones."""

import json

import ml_dtypes
import numpy as np
import pytest
from interop import checkpoints
from safetensors.numpy import save_file

from moe_jax.errors import ConfigError
from moe_jax.interop.tensors import INDEX, Reader, Writer

pytestmark = pytest.mark.unit

VALUES = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b": np.arange(4).astype(ml_dtypes.bfloat16),
  "c": np.float16([[1], [2]]),
}


def assert_same(reader):
  assert reader.entries.keys() == VALUES.keys()
  for name, value in VALUES.items():
    read = reader.read(name)
    assert read.dtype == value.dtype == reader.dtype(name)
    np.testing.assert_array_equal(read, value)


@pytest.mark.parametrize("largest, files", [(10**6, 1), (24, 2), (1, 3)])
def test_what_is_written_can_be_read(tmp_path, largest, files):
  # Catches an offset that forgets the header, a dtype that is lost, a file that is too large, and
  # an index whose names are those from before the files were counted.
  writer = Writer(tmp_path, largest)
  for name, value in VALUES.items():
    writer.add(name, value)
  writer.close()
  names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  assert len(names) == files and (tmp_path / INDEX).exists() == (files > 1)
  if files == 3:
    assert names[0] == "model-00001-of-00003.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 24 + 8 + 4
  assert_same(Reader(tmp_path))


def test_fp8_is_multiplied_by_the_factors_of_its_blocks(tmp_path):
  # Catches factors that are divided by, blocks in the wrong order, and a last block that is cut.
  # By hand: blocks of 2x2, of which the last column and row have one.
  weight = np.ones((3, 3)).astype(ml_dtypes.float8_e4m3fn)
  factors = np.float32([[1, 2], [3, 4]])
  header = {
    "w": {"dtype": "F8_E4M3", "shape": [3, 3], "data_offsets": [0, 9]},
    "w_scale_inv": {"dtype": "F32", "shape": [2, 2], "data_offsets": [9, 25]},
  }
  # The library does not write FP8 of NumPy.
  text = json.dumps(header).encode()
  content = len(text).to_bytes(8, "little") + text + weight.tobytes() + factors.tobytes()
  (tmp_path / "model.safetensors").write_bytes(content)
  reader = Reader(tmp_path, (2, 2))
  assert list(reader.entries) == ["w"] and reader.dtype("w") == ml_dtypes.bfloat16
  np.testing.assert_array_equal(reader.read("w"), [[1, 1, 2], [1, 1, 2], [3, 3, 4]])
  with pytest.raises(ConfigError, match="w is FP8 without factors"):
    Reader(tmp_path).read("w")


def index_of(folder):
  return json.loads((folder / INDEX).read_text())


def cut(folder):
  path = folder / "model-00001-of-00002.safetensors"
  path.write_bytes(path.read_bytes()[:-2])


def remove(folder):
  (folder / "model-00002-of-00002.safetensors").unlink()


def lead_outside(folder):
  index = index_of(folder)
  index["weight_map"]["a"] = "../other/model.safetensors"
  (folder / INDEX).write_text(json.dumps(index))


def name_wrongly(folder):
  index = index_of(folder)
  index["weight_map"]["b"] = index["weight_map"]["a"]
  (folder / INDEX).write_text(json.dumps(index))


def break_index(folder):
  (folder / INDEX).write_text('{"weight_map": ["a"]}')


def only_pickles(folder):
  for path in folder.glob("*.safetensors*"):
    path.unlink()
  (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
  "damage, words",
  [
    (cut, "model-00001-of-00002.safetensors is damaged or cut off"),
    (remove, "names model-00002-of-00002.safetensors, which is not there"),
    (lead_outside, r"names '../other/model.safetensors', outside the folder"),
    (name_wrongly, "model-00001-of-00002.safetensors lacks b of"),
    (break_index, "is no index, which has a weight_map"),
    (only_pickles, "pytorch_model.bin is a pickle, which is not read"),
  ],
)
def test_damage_is_one_sentence(tmp_path, damage, words):
  # Catches a traceback, a file outside the folder that is read, and tensors that are read from
  # another file than the index says.
  folder = checkpoints.write(tmp_path / "folder", VALUES, {}, files=2)
  damage(folder)
  with pytest.raises(ConfigError, match=words):
    Reader(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
  # Catches a tensor of which one of two values is taken silently.
  folder = checkpoints.write(tmp_path / "folder", VALUES, {}, files=3)
  save_file({"a": VALUES["a"], "c": VALUES["c"]}, folder / "model-00003-of-00003.safetensors")
  with pytest.raises(ConfigError, match="a is in two files"):
    Reader(folder)
