import numpy as np
import pytest
import tiny
from surgery.workdir_test import train

from moe_jax import load_run
from moe_jax.errors import ConfigError
from moe_jax.training import metrics

pytestmark = pytest.mark.smoke


def test_a_run_learns_from_another_one(tmp_path, monkeypatch):
  # Catches a teacher that is not loaded, or is drawn anew: a student that is the teacher itself
  # does not diverge from it before its first update.
  train(tiny.config(tmp_path), tmp_path / "teacher", 2, monkeypatch)
  before = load_run(tmp_path / "teacher").variables["params"]["embedding"]
  from moe_jax.surgery import inherit
  from moe_jax.surgery import workdir as surgery

  keys = {
    "train__teacher__workdir": str(tmp_path / "teacher"),
    "train__teacher__hard_weight": 1.0,
    "train__log_every": 1,
  }
  same = tiny.config(tmp_path, **keys)
  surgery.make(
    tmp_path / "teacher", tmp_path / "same", same, lambda run, old, new, config: dict(old)
  )
  train(same, tmp_path / "same", 2, monkeypatch)
  lines = [x for x in metrics.read(tmp_path / "same" / "metrics.jsonl") if x["kind"] == "train"]
  assert abs(lines[0]["teacher_divergence"]) < 1e-5 < lines[1]["teacher_divergence"]
  student = tiny.config(tmp_path, model__moe__num_experts=0, **keys)
  surgery.make(
    tmp_path / "teacher",
    tmp_path / "student",
    student,
    lambda run, old, new, config: inherit(old, new),
  )
  assert np.array_equal(load_run(tmp_path / "student").variables["params"]["embedding"], before)
  train(student, tmp_path / "student", 2, monkeypatch)
  lines = [x for x in metrics.read(tmp_path / "student" / "metrics.jsonl") if x["kind"] == "train"]
  assert lines[0]["teacher_divergence"] > 1e-3
  after = load_run(tmp_path / "teacher").variables["params"]["embedding"]
  assert np.array_equal(before, after)


def test_a_teacher_of_another_vocabulary_or_none_is_refused(tmp_path, monkeypatch):
  # Catches a divergence between ids that stand for different texts.
  train(tiny.config(tmp_path, model__vocab_size=300), tmp_path / "teacher", 2, monkeypatch)
  for folder, words in (("teacher", "predicts 300 ids"), ("absent", "holds no config.json")):
    config = tiny.config(tmp_path, train__teacher__workdir=str(tmp_path / folder))
    with pytest.raises(ConfigError, match=f"train.teacher.workdir=.*{words}"):
      train(config, tmp_path / "student", 2, monkeypatch)
    assert not (tmp_path / "student").exists()
