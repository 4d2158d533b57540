"""Models that are ready to decode, and the text of their tokens."""

import numpy as np
import pytest
import saved_run

import moe_jax
from moe_jax.run.text_model import source_rows, text_model

pytestmark = pytest.mark.smoke


@pytest.mark.every_variant
def test_a_mesh_changes_no_text(tmp_path):
  # Catches weights that are placed like those of another layer, which are scanned in training.
  place, _ = saved_run.save(tmp_path, model__num_layers=2, model__moe__every=1)
  alone = text_model(place)
  assert "repeats" not in alone.variables["params"]
  split = text_model(place, mesh={"tensor": 2, "expert": 2})
  (up,) = {leaf.sharding.spec for leaf in [split.variables["params"]["layer_1"]["ffn"]["up"]]}
  assert up[0] == "expert" and up[2] == "tensor"
  prompts = ["the expert", "a"]
  assert moe_jax.generate(split, prompts, max_tokens=5) == moe_jax.generate(
    alone, prompts, max_tokens=5
  )


def test_an_encoder_decoder_fills_gaps(tmp_path):
  # Catches sentinels that are read as text, that count from the wrong end, or that are not shown.
  place, _ = saved_run.save(
    tmp_path, model__family="encoder_decoder", data__objective="span_corruption"
  )
  run = text_model(place)
  first = run.num_ids - 1
  ids = run.encode("a<extra_id_0>b<extra_id_1>")
  assert ids == [97, first, 98, first - 1]
  assert run.decode(ids) == b"a<extra_id_0>b<extra_id_1>"
  assert run.decode([256, 97]) == b"a" and run.decode([]) == b""
  # There is no sentinel of this number, so it is text.
  assert len(run.encode("<extra_id_9999>")) == len("<extra_id_9999>")
  texts = moe_jax.generate(run, ["a<extra_id_0>b", "c"], max_tokens=4)
  assert len(texts) == 2 and texts[1] == moe_jax.generate(run, "c", max_tokens=4)


def test_rows_of_sources():
  # Catches padding before a source, whose positions would count from it.
  rows = source_rows([[5, 6, 7], [8]])
  assert rows["tokens"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
  assert rows["segment_ids"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
  assert rows["positions"].tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
  assert {name: row.dtype for name, row in rows.items()} == dict.fromkeys(rows, np.int32)


def test_a_model_that_cannot_decode_is_refused(tmp_path):
  # Catches a model of expert choice that is decoded as if each token chose its experts.
  place, _ = saved_run.save(
    tmp_path, model__moe__router__name="expert_choice", model__moe__allow_noncausal_routing=True
  )
  with pytest.raises(moe_jax.ConfigError, match="token by token"):
    text_model(place)
