"""metrics.jsonl has one line per event; after a resume none is lost and none is repeated."""

import json
import pathlib

import numpy as np
import pytest

from moe_jax.training import metrics

pytestmark = pytest.mark.unit


def test_lines_after_the_restored_step_are_dropped(tmp_path):
  # Catches a resumed run that repeats steps 3 and 4, and a line that is appended to one that a kill
  # has cut short.
  writer = metrics.MetricsWriter(tmp_path, 0)
  for step in (1, 2, 3, 4):
    writer.write(step, "train", {"loss": float(step)})
  writer.close()
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 5, "ki')
  writer = metrics.MetricsWriter(tmp_path, 2)
  writer.write(3, "train", {"loss": 30.0})
  writer.close()
  assert [(line["step"], line["loss"]) for line in metrics.read(path)] == [
    (1, 1.0),
    (2, 2.0),
    (3, 30.0),
  ]
  assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
  "bad",
  [
    b"{",
    b"[1]",
    b"\xff\xfe",
    b'{"kind": "train"}',
    b'{"step": "3", "kind": "train"}',
    b"[" * 100_000,
    b'{"step": 1}',
    b'{"step": true, "kind": "train"}',
    b'{"step": 1e999, "kind": "train"}',
    b'{"step": 1, "kind": "train", "batch": []}',
  ],
)
def test_a_damaged_line_costs_only_itself(tmp_path, bad):
  # Catches a resume that deletes all lines before or after a damaged one, and one that deletes the
  # damaged line or does not report it.
  path = tmp_path / "metrics.jsonl"
  good = [json.dumps({"step": n, "kind": "train", "loss": float(n)}).encode() for n in (1, 2, 3)]
  path.write_bytes(b"\n".join([good[0], b"", bad, good[1], b"  ", good[2], b""]))
  writer = metrics.MetricsWriter(tmp_path, 3)
  writer.close()
  assert [line["step"] for line in metrics.read(path)] == [1, 2, 3] and path.read_bytes().count(
    b"\n"
  ) == 3
  aside = tmp_path / "metrics.jsonl.damaged"
  assert (
    aside.read_bytes() == bad + b"\n"
    and str(aside) in writer.told
    and "1 damaged line" in writer.told
  )
  again = metrics.MetricsWriter(tmp_path, 3)
  again.close()
  assert again.told == ""


def test_events_stay_when_the_run_goes_back(tmp_path):
  # Catches a rollback that leaves no trace, a rollback that is written twice after a kill, and
  # curves with two values for a step.
  writer = metrics.MetricsWriter(tmp_path, 0)
  for step in (2, 4, 6):
    writer.write(step, "train", {"loss": 1.0})
  writer.forget_after(4)
  # The rollback happened after step 6, which read batch 6. The new step 6 reads batch 8.
  writer.event(4, {"event": "rollback", "batch": 6})
  writer.write(6, "train", {"loss": 2.0})
  writer.close()

  def kinds():
    return [(line["step"], line["kind"]) for line in metrics.read(tmp_path / "metrics.jsonl")]

  assert kinds() == [(2, "train"), (4, "train"), (4, "event"), (6, "train")]
  metrics.MetricsWriter(tmp_path, 6, 8).close()
  assert len(kinds()) == 4
  # A run that continues from the checkpoint before the rollback will go back again.
  metrics.MetricsWriter(tmp_path, 4, 4).close()
  assert kinds() == [(2, "train"), (4, "train")]


def test_arrays_are_lists_and_nan_is_null(tmp_path):
  # Catches a NaN, which is not valid JSON, and an array that is written as its repr.
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(
    1, "train", {"loss": np.float32("nan"), "moe/load": np.array([[0.25, 0.75]], np.float32)}
  )
  writer.close()
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert line == {"step": 1, "kind": "train", "loss": None, "moe/load": [[0.25, 0.75]]}


def test_tensorboard_gets_a_curve_an_entry(tmp_path):
  # Catches scalars that never reach the event file.
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(1, "train", {"loss": 1.0, "moe/load": np.ones((1, 2))})
  writer.close()
  content = b"".join(p.read_bytes() for p in (tmp_path / "tb").iterdir())
  assert b"train/loss" in content and b"train/moe/load/0/1" in content


def test_other_processes_write_nothing(tmp_path):
  # Catches processes that overwrite each other's lines.
  writer = metrics.MetricsWriter(tmp_path, 0, active=False)
  writer.write(1, "train", {"loss": 1.0})
  writer.close()
  assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk_is_an_error_and_no_hang(tmp_path):
  # Catches a board whose own thread meets the full disk: nobody would then empty its queue, and the
  # run would hang for ever.
  writer = metrics.MetricsWriter(tmp_path, 0)
  records = writer._boards[0]._events._py_recordio_writer
  records._writer.close()
  records._writer = open("/dev/full", "wb", buffering=0)
  with pytest.raises(OSError, match="No space left"):
    for step in range(1, 40):
      writer.write(step, "train", {"loss": np.ones(40)})
  assert len(metrics.read(tmp_path / "metrics.jsonl")) == 1
  records._writer.close()
