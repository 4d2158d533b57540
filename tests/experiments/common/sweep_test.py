"""Checks the runner of studies on a program that pretends to train."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.common import journal, sweep
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
ROOT = pathlib.Path(__file__).resolve().parents[3]

# Does what --config says: ok, diverge, crash, wrong, slow (until it is told to stop; its second
# start is ok). It also counts its starts.
PROGRAM = """
import json, os, pathlib, signal, sys, time
flags = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
place, what = pathlib.Path(flags["workdir"]), flags["config"]
place.mkdir(exist_ok=True)
with open(place / "starts", "a") as starts:
  starts.write("x")
if what == "diverge":
  print("error: training has diverged: at step 3", file=sys.stderr)
  sys.exit(3)
if what == "crash":
  raise RuntimeError("INTERNAL: CUDA error: out of memory")
if what == "wrong":
  print("error: no such key", file=sys.stderr)
  sys.exit(2)
if what == "slow" and not (place / "saved").exists():
  def stop(*_):
    (place / "saved").write_text("")
    sys.exit(0)
  signal.signal(signal.SIGTERM, stop)
  (place / "ready").write_text("")
  time.sleep(60)
seen = {"device": os.environ["CUDA_VISIBLE_DEVICES"]} if what == "device" else {}
time.sleep(0.1 if seen else 0)
results = {"loss": len(what), "sample": "long", "seed": flags.get("config.seed"), **seen}
(place / "results.json").write_text(json.dumps(results))
"""
FAKE = (sys.executable, "-c", PROGRAM)


def study(tmp_path, processes=1, **configs):
  rows = {name: sweep.Row(config) for name, config in configs.items()}
  sweep.run(rows, tmp_path / "results.jsonl", tmp_path / "runs", processes, FAKE)


def starts(tmp_path):
  return {p.parent.name: len(p.read_text()) for p in (tmp_path / "runs").glob("*/starts")}


def test_a_study_runs_each_row_once(tmp_path):
  # Catches rows that run again, whose line is lost, or who overwrite each other's.
  study(tmp_path, a="ok")
  study(tmp_path, 2, a="ok", b="ok", c="ok")
  found = journal.load(tmp_path / "results.jsonl")
  assert starts(tmp_path) == {"a": 1, "b": 1, "c": 1}
  assert {name: line["loss"] for name, line in found.items()} == {"a": 2, "b": 2, "c": 2}
  assert found["a"] == {"row": "a", "arguments": ["--config=ok"], "loss": 2, "seed": None}


def test_each_device_trains_a_row_at_a_time(tmp_path):
  # Catches runs that all see all devices, a device that is never used, or that is not given back
  # after a run.
  rows = {name: sweep.Row("device") for name in "abcd"}
  sweep.run(rows, tmp_path / "results.jsonl", tmp_path / "runs", 1, FAKE, devices=("5", "7"))
  found = [line["device"] for line in journal.load(tmp_path / "results.jsonl").values()]
  assert len(found) == 4 and set(found) == {"5", "7"}


def test_a_row_that_diverges_is_an_outcome_and_one_that_is_wrong_is_not(tmp_path):
  # Catches a study that ends at the first unstable run, or that takes a misspelt key or a crash for
  # instability.
  study(tmp_path, a="diverge", b="ok")
  found = journal.load(tmp_path / "results.jsonl")
  assert found["a"]["diverged"] == "training has diverged: at step 3" and found["b"]["loss"] == 2
  with pytest.raises(ConfigError, match="row='c': ended with exit code 2: error: no such key"):
    study(tmp_path, a="diverge", b="ok", c="wrong")
  with pytest.raises(
    ConfigError, match="row='d': ended with exit code 1: RuntimeError: INTERNAL: CUDA error"
  ):
    study(tmp_path, a="diverge", b="ok", d="crash")
  assert journal.load(tmp_path / "results.jsonl") == found


def test_a_finished_row_with_other_arguments_is_refused(tmp_path):
  # Catches a table of two different experiments.
  study(tmp_path, a="ok")
  with pytest.raises(
    ConfigError,
    match="row 'a' was run with --config=ok, and is now run with --config=diverge; give",
  ):
    study(tmp_path, a="diverge")
  assert starts(tmp_path) == {"a": 1}


def test_flags_that_are_left_out_or_new_are_named(tmp_path):
  # Catches a sentence that says "the rest of these flags", and a refusal of another order.
  results, row = tmp_path / "results.jsonl", sweep.Row("ok", {"a": 1}, router="mine.py:mine")
  journal.append(results, {"row": "x", "arguments": row.arguments()[::-1]})
  assert not sweep.unfinished({"x": row}, results)
  for other, words in (
    (sweep.Row("ok", {"a": 1}), "was run with --router=mine.py:mine, which is left out now; give"),
    (
      dataclasses.replace(row, seeds=2),
      "was run without --seeds=2, with which it is run now; give",
    ),
  ):
    with pytest.raises(ConfigError, match=words):
      sweep.unfinished({"x": other}, results)


@pytest.mark.parametrize(
  "log, words",
  [
    ("", "starting"),
    ("0/30 [00:00<?, ?step/s]", "step 0/30, which compiles"),
    ("\r 40%|####   | 12/30 [00:10<00:15,  1.20step/s, loss 3.1]\r", "step 12/30, 00:15 left"),
    ("\r100%|#######| 30/30 [00:25<00:00,  1.20step/s]", "step 30/30, final evaluation"),
    ("step 20/800  loss 3.2\n", "step 20/800  loss 3.2"),
  ],
)
def test_the_last_words_of_a_log(tmp_path, log, words):
  # Catches the words of an earlier start, a bar that is shown with its drawing or not found.
  file = tmp_path / "a.log"
  file.write_bytes(b"step 7/9\n" + log.encode())
  assert sweep.last_words(file, len(b"step 7/9\n")) == words


@pytest.mark.parametrize(
  "log, share",
  [
    ("", 0.0),
    ("step 20/800  loss 3.2\nevaluating: 8 s so far\n", 0.025),
    ("\r 40%|####   | 12/30 [00:10<00:15,  1.20step/s, loss 3.1]\r", 0.4),
  ],
)
def test_the_share_of_a_row_that_is_done(tmp_path, log, share):
  # Catches the step of an earlier start, and a share that falls to 0 while a row is evaluated.
  file = tmp_path / "a.log"
  file.write_bytes(b"step 7/9\n" + log.encode())
  assert sweep.share(file, len(b"step 7/9\n")) == share


def test_the_time_that_is_left():
  # Worked by hand: 1.5 of 4 rows took 90 s, so that 2.5 rows take 150 s.
  # Catches an estimate that counts whole rows only, and a division by 0.
  assert sweep.left(90.0, 1.5, 4) == "0:01:30 so far, about 0:02:30 left"
  assert sweep.left(5.0, 0.0, 4) == "0:00:05 so far, the rest is not known yet"


def test_a_row_says_that_it_begins_and_how_far_it_is(tmp_path, monkeypatch, capsys):
  # Catches minutes of silence.
  monkeypatch.setattr(sweep.progress, "SILENCE", 0.05)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
  study(tmp_path, a="device", b="device")
  said = capsys.readouterr().out
  assert f"row 1 of 2, a: training; its log is {tmp_path / 'runs' / 'a.log'}\n" in said
  assert "row 2 of 2, b: starting; 0 s so far\n" in said and "\nstudy: 0:00:00 so far, " in said


def test_a_line_that_a_kill_cut_short(tmp_path):
  # Catches a study that cannot go on after a kill, or a damaged line in the middle that is passed
  # over.
  study(tmp_path, a="ok", b="ok")
  file = tmp_path / "results.jsonl"
  lines = file.read_text().splitlines()
  file.write_text(lines[0] + "\n" + lines[1][:20])
  study(tmp_path, a="ok", b="ok")
  assert file.read_text().splitlines() == lines and starts(tmp_path) == {"a": 1, "b": 2}
  file.write_text(lines[0][:20] + "\n" + lines[1] + "\n")
  with pytest.raises(ConfigError, match="results.jsonl:1"):
    study(tmp_path, a="ok", b="ok")


def test_a_study_that_is_stopped_lets_its_runs_save(tmp_path):
  # Catches runs that outlive the study or die without saving, and a study that cannot go on.
  code = (
    f"import pathlib, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    "from experiments.common import sweep\n"
    f"here = pathlib.Path({str(tmp_path)!r})\n"
    "sweep.run({'a': sweep.Row('slow'), 'b': sweep.Row('ok')}, here / 'results.jsonl', here / "
    "'runs', 1, "
    f"{FAKE!r})"
  )
  process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
  while not (tmp_path / "runs" / "a" / "ready").exists():
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGTERM)
  assert process.wait(30) == 143
  assert (tmp_path / "runs" / "a" / "saved").exists() and not (tmp_path / "results.jsonl").exists()
  study(tmp_path, a="slow", b="ok")
  assert list(journal.load(tmp_path / "results.jsonl")) == ["a", "b"] and starts(tmp_path) == {
    "a": 2,
    "b": 1,
  }
