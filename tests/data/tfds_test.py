import importlib
import json
import shutil
import subprocess
import sys

import pytest

from moe_jax.data import make_sources, make_tokenizer, train_iterator, validation_batches
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class LittleText(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First."}

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "text": tfds.features.Text(), "n": tfds.features.Scalar(np.int32)}))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(60), "held_out": self._generate_examples(9)}

  def _generate_examples(self, n):
    for i in range(n):
      yield i, {"text": f"example {i} of {n} \\u4e16", "n": i}
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
  """Returns a folder in which TFDS has prepared the dataset little_text:1.0.0 as array_record."""
  code, folder = tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("tfds")
  (code / "little_text_builder.py").write_text(BUILDER)
  sys.path.insert(0, str(code))
  try:
    module = importlib.import_module("little_text_builder")
  finally:
    sys.path.remove(str(code))
  module.LittleText(data_dir=str(folder), file_format="array_record").download_and_prepare()
  return folder


@pytest.fixture
def little(data, prepared):
  data.tfds_dir, data.sources = str(prepared), ("tfds:little_text",)
  return data


def _texts(n):
  return sorted(f"example {i} of {n} \u4e16".encode() for i in range(n))


def test_held_out_by_the_hash(little):
  # Catches examples that are in both parts or in none, and texts that are not bytes.
  source = make_sources(little)[0]
  train, validation = (list(source.documents(side)) for side in ("train", "validation"))
  assert sorted(train + validation) == _texts(60) and 5 < len(validation) < 30


def test_a_named_split_is_held_out(little):
  # Catches a validation_split that is ignored or whose examples are trained on.
  little.validation_split = "held_out"
  source = make_sources(little)[0]
  assert sorted(source.documents("train")) == _texts(60) and sorted(
    source.documents("validation")
  ) == _texts(9)


@pytest.mark.parametrize("pipeline", ["windows", "stream"])
def test_both_pipelines_read_it(little, pipeline):
  # Catches NumPy integers as indices, which the data source refuses, and readers that threads
  # cannot share.
  little.pipeline, little.threads = pipeline, 2
  source, tokenizer = make_sources(little), make_tokenizer("bytes")
  it = train_iterator(little, tokenizer, source, 4)
  text = b"".join(tokenizer.decode(next(it)["inputs"]) for _ in range(10))
  it.close()
  assert b"of 60 \xe4\xb8\x96" in text
  batches = list(validation_batches(little, tokenizer, source[0], 4))
  size = sum(tokenizer.byte_lengths[b["targets"][b["segment_ids"] > 0]].sum() for b in batches)
  assert size == sum(map(len, source[0].documents("validation")))


def test_version(little):
  # Catches a version that is ignored.
  (without,) = make_sources(little)
  little.sources = ("tfds:little_text:1.0.0",)
  assert (
    make_sources(little)[0].fingerprint == without.fingerprint and len(without.fingerprint) == 64
  )
  little.sources = ("tfds:little_text:2.0.0",)
  with pytest.raises(ConfigError, match="is not prepared in .*prepared there: little_text/1.0.0"):
    make_sources(little)


def test_not_prepared_is_told_and_not_downloaded(data):
  # Catches an attempt to download, which takes minutes without a network, and an error that does
  # not say how to prepare the dataset.
  data.sources = ("tfds:tiny_shakespeare",)
  with pytest.raises(
    ConfigError, match="(?s)not prepared in .*nothing is prepared there.*tfds.builder.*array_record"
  ):
    make_sources(data)


def test_wrong_field_or_split(little):
  # Catches a KeyError in the middle of training.
  little.text_field = "body"
  with pytest.raises(ConfigError, match="data.text_field='body': .* it has n, text"):
    make_sources(little)
  little.text_field, little.validation_split = "n", ""
  with pytest.raises(ConfigError, match="data.text_field='n': .* is not text"):
    make_sources(little)
  little.text_field, little.validation_split = "text", "test"
  with pytest.raises(ConfigError, match="data.validation_split='test': .* it has held_out, train"):
    make_sources(little)


def test_another_file_format(little, prepared, tmp_path):
  # Catches the NotImplementedError of TFDS, whose hint does not help without TensorFlow.
  copy = tmp_path / "tfds" / "little_text" / "1.0.0"
  copy.mkdir(parents=True)
  for name in ("features.json", "dataset_info.json"):
    (copy / name).write_text((prepared / "little_text" / "1.0.0" / name).read_text())
  info = json.loads((copy / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
  (copy / "dataset_info.json").write_text(json.dumps(info))
  little.tfds_dir = str(tmp_path / "tfds")
  with pytest.raises(
    ConfigError, match="is prepared as tfrecord and not as array_record; .*convert_format"
  ):
    make_sources(little)


def test_tensorflow_is_not_needed(prepared):
  # Catches an import of TensorFlow, which is not installed and would take seconds if it were.
  script = (
    "import sys\n"
    "from moe_jax.data.options import DataOptions\n"
    "from moe_jax.data.tfds import tfds\n"
    "data = DataOptions(tfds_dir=sys.argv[1], validation_split='held_out')\n"
    "print(len(tfds('tfds:little_text', data)[1]['validation']), 'tensorflow' in sys.modules)\n"
  )
  import moe_jax

  out = subprocess.run(
    [sys.executable, "-c", script, str(prepared)],
    capture_output=True,
    text=True,
    env={"PYTHONPATH": f"{moe_jax.__path__[0]}/.."},
  )
  assert out.stdout.strip() == "9 False", out.stderr


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[]"])
@pytest.mark.parametrize("which", ["features.json", "dataset_info.json", "*.array_record*"])
def test_a_damaged_dataset(little, prepared, tmp_path, which, content):
  # Catches exceptions of TFDS and array_record, which do not name the source.
  shutil.copytree(prepared, tmp_path / "tfds")
  for path in (tmp_path / "tfds").rglob(which):
    path.write_bytes(content)
  little.tfds_dir = str(tmp_path / "tfds")
  with pytest.raises(
    ConfigError, match="^data.(sources='tfds:little_text'|text_field='text'|validation_split=)"
  ):
    for split in make_sources(little)[0].splits.values():
      list(split)
