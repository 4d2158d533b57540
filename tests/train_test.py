"""Tests the training command: its messages for mistakes, and runs that are killed and resumed."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import tiny

from moe_jax import commands, data, train
from moe_jax import inspect as inspection
from moe_jax.data.options import DataOptions
from moe_jax.errors import EXIT_DIVERGED, Diverged
from moe_jax.run import loop
from moe_jax.training import metrics, workdir

pytestmark = pytest.mark.smoke
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
  """Restores the hooks of `sys` after each test, because a damaged checkpoint replaces them."""
  for name in ("excepthook", "unraisablehook"):
    monkeypatch.setattr(sys, name, getattr(sys, name))


def arguments(tmp_path, *extra, **changes):
  """Returns the command line of a tiny run, with `extra` flags and `changes` of its config."""
  flags = tiny.flags(tmp_path, **changes)
  return ["train", "--config=configs/base.py", f"--workdir={tmp_path / 'run'}", *flags, *extra]


def fails(capfd, argv, *words):
  """Runs a command that must fail with code 2 and one line, and returns that line.

  The line must begin with "error: " and contain `words`.
  """
  assert train.main(argv) == 2
  err = [line for line in capfd.readouterr().err.splitlines() if line]
  assert len(err) == 1 and err[0].startswith("error: "), err
  for word in words:
    assert word in err[0], (word, err[0])
  return err[0]


@pytest.mark.parametrize(
  "extra, words",
  [
    (
      ["--config.model.moe.router.name=swich"],
      ["model.moe.router.name='swich'", "top_k, ", "expert_choice, "],
    ),
    (
      ["--config.model.moe.router.name=top_kk"],
      ["model.moe.router.name='top_kk'", "did you mean 'top_k'"],
    ),
    (
      ["--config.model.moe.num_exports=4"],
      ["model.moe.num_exports='4'", "did you mean model.moe.num_experts?"],
    ),
    (["--config.num_experts=4"], ["num_experts='4'", "did you mean model.moe.num_experts?"]),
    (["--config.train.steps=many"], ["train.steps='many'", "of type int, as in "]),
    (["--config.model.moe.capacity_factor=big"], ["model.moe.capacity_factor='big'", "a number"]),
    (["--config.model.tied_embeddings=maybe"], ["model.tied_embeddings='maybe'", "of type bool"]),
    (["--config.train.steps"], ["--config.train.steps", "Missing value"]),
    (["--config.model.moe.router.top_k.k=9"], ["k=9", "4"]),  # K > E
    (["--config.mesh.data=8"], ["train.batch_size=4", "multiple of 8"]),
    (["--config.mesh.data=3", "--config.mesh.expert=4"], ["mesh", "8 devices"]),
    (["--config.optimizer.name=adam"], ["optimizer.name='adam'", "'adamw'"]),
    (["--config.data.sources=text:/nowhere/*.txt"], ["data.sources", "/nowhere/*.txt"]),
    (["--config.data.sources=embedded:prosa"], ["data.sources", "prosa", "prose"]),
    (["--config.data.tokenizer=byte"], ["data.tokenizer='byte'", "bytes"]),
    (
      ["--config.data.tokenizer=sentencepiece:/nowhere/x.model"],
      ["data.tokenizer", "/nowhere/x.model"],
    ),
    (["--workdr=x"], ["--workdr", "unknown", "--workdir"]),
    (["--steps=20"], ["flag='--steps'", "--config.train.steps=20"]),
    (["--steps", "20"], ["flag='--steps'", "--config.train.steps=VALUE"]),
    (["--lr=3e-4"], ["flag='--lr'", "--config.optimizer.learning_rate=3e-4"]),
    (["--batch-size=8"], ["flag='--batch-size'", "--config.train.batch_size=8"]),
    (["--seed=1"], ["flag='--seed'", "--config.seed=1"]),
    (["--k=2"], ["flag='--k'", "the flags are --config, "]),
    (["workdir"], ["argument='workdir'", "--flag=value"]),
    (["--workdir="], ["workdir=''", "missing"]),
    (
      ["--config=configs/quickstrat.py"],
      ["quickstrat.py", "no such file", "did you mean quickstart?"],
    ),
    (["--config=configs/quickstart.py:variant"], ["configs/quickstart.py:variant", "get_config"]),
    (["--config="], ["config=''", "is missing", "--config=NAME", "quickstart"]),
    (["--workdir=/proc/self/new"], ["workdir='/proc/self/new'", "cannot be written"]),
    (["--workdir=a\0b"], ["NUL"]),
    (["--workdir=~nobody_has_this_name/x"], ["workdir=", "without ~"]),
    (["--config=~nobody_has_this_name/x.py"], ["config=", "without ~"]),
    (["--config=configs"], ["is a directory"]),
    (["--config=README.md"], ["README.md", "a Python file, *.py"]),
    (["--config=" + "x" * 5000], ["config='x", "..."]),
    (["--config.model=5"], ["model='5': holds other keys", "such as --config.model."]),
    (["--config.model"], ["model='': holds other keys"]),
    (["--config.model.moe.router=switch"], ["--config.model.moe=switch"]),
    (["--config.model.moe.router=top_k"], ["--config.model.moe.router.name=top_k"]),
    (
      ["--config.model.moe.router.name=switch"],
      ["name='switch'", "is a preset", "--config.model.moe=switch"],
    ),
    (["--config.model.moe=noisy_topk"], ["did you mean 'noisy_top_k'"]),
    (["--config.model.moe=device_limited"], ["--config.model.moe.router.name=device_limited"]),
    (["--config.model.moe.dispatcher=einsum"], ["--config.model.moe.dispatcher.name=einsum"]),
    (["--config.train.steps=None"], ["train.steps='None'", "of type int"]),
    (["--config.train.steps=" + "9" * 5000], ["train.steps='999", "of type int"]),
    (["--config.seed=4294967296"], ["seed=4294967296", "at most 4,294,967,295"]),
    (["--config.seed=-1"], ["seed=-1", "at least 0"]),
    (["--config.seed=" + "9" * 20], ["seed=9", "at most"]),
    (["--config.model.num_layers=2147483648"], ["model.num_layers=2147483648", "at most 1,000"]),
    (["--config.model.moe.capacity_factor=inf"], ["model.moe.capacity_factor=inf", "at most"]),
    (["--config.optimizer.learning_rate=nan"], ["optimizer.learning_rate=nan", "above 0"]),
    (["--config.optimizer.warmup_steps=7"], ["optimizer.warmup_steps=7", "train.steps=6"]),
    (["--noconfig.train.steps"], ["config.train.steps"]),
    (["--flagfile=/nowhere"], ["/nowhere"]),
    (["--config.data.sources=(1,)"], ["data.sources=", "must be a string"]),
    (["--config.data.sources=" + "(" * 300], ["data.sources="]),
    (["--distributed=1.2.3.4,2,0"], ["distributed=", "HOST:PORT"]),
    (["--distributed=a:1,2,2"], ["distributed=", "INDEX"]),
    (["--distributed=a:99999,2,0"], ["distributed=", "HOST:PORT"]),
    (["--distributed=a:1,\u00b2,0"], ["HOST:PORT"]),
    (["--distributed="], ["distributed=''", "HOST:PORT"]),
  ],
)
def test_a_mistake_on_the_command_line(tmp_path, capfd, extra, words):
  # Catches a mistake that is reported with a traceback, or only after something was written.
  fails(capfd, arguments(tmp_path, *extra), *words)
  assert not (tmp_path / "run").exists()


def test_mistakes_in_files(tmp_path, capfd):
  # Catches files that are read too late, and exceptions of the libraries that read them.
  (tmp_path / "empty.txt").write_text("")
  fails(
    capfd, arguments(tmp_path, data__sources=f"text:{tmp_path}/empty.txt"), "data.sources", "empty"
  )
  (tmp_path / "text.model").write_text("no model")
  wrong = f"sentencepiece:{tmp_path}/text.model"
  fails(capfd, arguments(tmp_path, data__tokenizer=wrong), "data.tokenizer", "text.model")
  (tmp_path / "broken.py").write_text("def get_config(:")
  fails(capfd, arguments(tmp_path, f"--config={tmp_path}/broken.py"), "broken.py", "SyntaxError")
  (tmp_path / "nothing.py").write_text("x = 1")
  fails(capfd, arguments(tmp_path, f"--config={tmp_path}/nothing.py"), "nothing.py", "get_config")
  (tmp_path / "string.py").write_text("def get_config(): return 'x'")
  fails(
    capfd,
    arguments(tmp_path, f"--config={tmp_path}/string.py"),
    "string.py",
    "returns 'x'",
    "ConfigDict",
  )
  for name, line, word in (
    ("exits", "raise SystemExit(0)", "SystemExit"),
    ("endless", "f = lambda: f(); f()", "RecursionError"),
    ("binary", "\0", "null bytes"),
  ):
    (tmp_path / f"{name}.py").write_text(f"{line}\n")
    fails(capfd, arguments(tmp_path, f"--config={tmp_path}/{name}.py"), f"{name}.py", word)
  head = "from configs import base\ndef get_config():\n  c = base.get_config()\n  c.unlock()\n  "
  for name, line, words in (
    ("more", "c.mine = 1", ["mine=1", "no such key"]),
    ("less", "del c.seed", ["seed", "missing"]),
    ("branch", "del c.model; c.model = 5", ["model=5", "holds other keys"]),
    ("huge", "c.seed = 10**5000", ["seed=2**", "at most"]),
    ("latent", "del c.model.latent.kv_rank", ["model.latent.kv_rank", "missing"]),
  ):
    (tmp_path / f"{name}.py").write_text(f"{head}{line}\n  return c\n")
    fails(capfd, arguments(tmp_path, f"--config={tmp_path}/{name}.py"), *words)
  (tmp_path / "file").write_text("")
  fails(capfd, arguments(tmp_path, f"--workdir={tmp_path}/file"), "workdir", "is a file")


def test_a_workdir_that_is_not_this_runs(tmp_path, capfd):
  # Catches files of another run that are overwritten, and a new run that silently begins because a
  # checkpoint is damaged.
  place = tmp_path / "run"
  config = commands.parse(arguments(tmp_path)).config
  workdir.claim(place, config)
  source = config.data.sources[0]
  workdir.note_start(
    place, config, {"config": "x", "data": {source: "0" * 64}, "tokenizer": "bytes"}, {}
  )
  fails(capfd, arguments(tmp_path), "data.sources", "0000000000000000", source)
  fails(capfd, arguments(tmp_path, model__d_model=32), "model.d_model=32", "model.d_model=16")
  fails(capfd, arguments(tmp_path, seed=7), "seed=7", "seed=0")
  assert "starts" in json.loads((place / "meta.json").read_text())
  (place / "meta.json").unlink()
  (place / "checkpoints" / "4" / "state").mkdir(parents=True)
  fails(capfd, arguments(tmp_path), "workdir=", "no meta.json", "restore that file")
  sources = data.fingerprints(data.make_sources(DataOptions.of(config.data)))
  workdir.note_start(place, config, {"config": "x", "data": sources, "tokenizer": "bytes"}, {})
  fails(
    capfd,
    arguments(tmp_path),
    "checkpoints/4",
    "cannot be read",
    "restore this directory from a copy",
  )
  fails(capfd, arguments(tmp_path, train__steps=2), "train.steps=2", "already at step 4")
  assert not (place / "metrics.jsonl").exists()


def test_debug_shows_the_traceback(tmp_path, capfd):
  # Catches a flag --debug that does nothing.
  assert train.main(arguments(tmp_path, "--debug", "--config.optimizer.name=adam")) == 2
  assert "Traceback" in capfd.readouterr().err


def test_divergence_has_an_exit_code_of_its_own(tmp_path, capfd, monkeypatch):
  # Catches a run with NaNs that counts as a success, or cannot be distinguished from a crash.
  def diverge(*_):
    raise Diverged("training has diverged: at step 3")

  monkeypatch.setattr(loop, "train", diverge)
  assert train.main(arguments(tmp_path)) == EXIT_DIVERGED == 3
  assert capfd.readouterr().err == "error: training has diverged: at step 3\n"


@pytest.mark.parametrize(
  "different, code, words",
  [([], 0, "gave the same bits"), (["params/w"], 4, "1 arrays differ; the first is params/w")],
)
def test_determinism_is_checked_and_nothing_is_written(
  tmp_path, capfd, monkeypatch, different, code, words
):
  # Catches a check that trains, writes into the workdir, or always ends with 0.
  monkeypatch.setattr(loop, "determinism", lambda config: different)
  assert train.main(arguments(tmp_path, "--check_determinism")) == code
  assert words in "".join(capfd.readouterr()) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--tracker=wanb", "did you mean 'wandb'?"),
    ("--tracker", "tracker=''"),
    ("--profile=0", "at least 1"),
    ("--profile=x", "a whole number"),
    ("--check_determinism=maybe", "--check_determinism alone"),
    ("--profil", "--profile"),
  ],
)
def test_wrong_flags_are_one_sentence(tmp_path, capfd, flag, words):
  # Catches a flag that is ignored, and a mistake that is noticed after compilation.
  assert train.main(arguments(tmp_path, flag)) == 2
  said = capfd.readouterr().err
  assert words in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_flags_reach_the_loop(tmp_path, monkeypatch):
  # Catches a flag that is accepted and does nothing.
  seen = []
  monkeypatch.setattr(loop, "train", lambda *args: seen.append(args[3]))
  assert train.main(arguments(tmp_path, "--tracker=wandb", "--profile")) == 0
  assert train.main(arguments(tmp_path, "--profile=7")) == 0
  assert [(watch.tracker, watch.profile) for watch in seen] == [("wandb", 5), ("", 7)]


def execute(argv, **environment):
  """Runs Python with these arguments, one CPU device and these environment variables."""
  # If XLA's flag for the number of devices occurs twice, the last one counts.
  one_device = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
  environment = os.environ | {"XLA_FLAGS": one_device} | environment
  return subprocess.run(
    [sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
  )


def test_as_a_process_a_mistake_exits_with_2(tmp_path):
  # Catches an exit code that is lost, and output of libraries on standard error.
  done = execute(
    ["-m", "moe_jax.train", *arguments(tmp_path, "--config.model.moe.router.name=swich")[1:]]
  )
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.count("\n") == 1 and done.stderr.startswith(
    "error: model.moe.router.name='swich': "
  )


@pytest.mark.every_variant
def test_an_encoder_decoder_trains_stops_resumes_and_reports(tmp_path, capfd):
  # Catches a part of a run that assumes a decoder, such as initialisation, steps, checkpoints,
  # evaluation or the report, and a resumed run that masks other spans than one that was not
  # interrupted.
  changes = dict(
    model__family="encoder_decoder",
    model__position="relative",
    model__relative_shared=True,
    model__relative_buckets=8,
    model__relative_max_distance=16,
    model__query_scale=1.0,
    model__embed_scale=False,
    model__num_encoder_layers=4,
    model__dropout=0.1,
    data__objective="span_corruption",
    data__encoder_len=48,
    data__noise_density=0.3,
    data__mean_span=2.0,
    train__eval_every=2,
  )
  for steps in (2, 4):
    assert (
      train.main(arguments(tmp_path, train__steps=steps, optimizer__schedule="constant", **changes))
      == 0
    )
  place = tmp_path / "run"
  results = json.loads((place / "results.json").read_text())
  (score,) = results["nats_per_target"].values()
  lines = metrics.read(place / "metrics.jsonl")
  # The model has learnt something since its second step.
  assert results["steps"] == 4 and 0 < score < lines[0]["cross_entropy"]
  assert "bits_per_byte" not in results and results["sample"] == "" and results["ladder"] == {}
  assert [(line["step"], line["kind"]) for line in lines] == [
    (n, kind) for n in (2, 4) for kind in ("train", "eval")
  ]
  assert len(lines[0]["moe/load"]) == 3 and "nats_per_target" in lines[1]
  routing = json.loads((place / "routing.json").read_text())
  assert routing["layers"] == [0, 2] and len(routing["pages"][0]["experts"]) == 2
  report = (place / "report.html").read_text()
  assert all(words in report for words in ("encoder layer 2", "decoder layer 0", "nats per target"))
  assert "bits per byte" not in report and "nats per target" in capfd.readouterr().out
  argv = arguments(tmp_path, train__steps=4, optimizer__schedule="constant", **changes)
  argv = [arg.replace(str(place), str(tmp_path / "whole")) for arg in argv]
  assert train.main(argv) == 0
  one, other = (
    inspection.describe(tmp_path / name)["parameters_sha256"] for name in ("run", "whole")
  )
  assert one == other


# A run without a report that sends itself the signal in the variable STOP. "TERM 3" sends SIGTERM
# when batch 3 is read, and "KILL 2" sends SIGKILL when batch 2 is read. "SAVE 4" sends SIGKILL when
# the checkpoint of step 4 is complete and is about to be renamed. "NEVER 0" sends nothing.
DRIVER = """
import os, pathlib, signal, sys
from moe_jax import commands, data, train
from moe_jax.run import finish
finish.finish = lambda *args, **kwargs: print("finished")
what, step = os.environ["STOP"].split()
make = data.train_iterator
def train_iterator(*args, **kwargs):
  batches = make(*args, **kwargs)
  read = type(batches).__next__
  def following(self):
    batch = read(self)
    if what in ("TERM", "KILL") and self.get_state()["batches"] == int(step):
      os.kill(os.getpid(), getattr(signal, "SIG" + what))
    return batch
  type(batches).__next__ = following
  return batches
data.train_iterator = train_iterator
def deadly(move):
  def moved(source, target, *args, **kwargs):
    if what == "SAVE" and pathlib.Path(target).name == step:
      os.kill(os.getpid(), signal.SIGKILL)
    return move(source, target, *args, **kwargs)
  return moved
os.rename, os.replace = deadly(os.rename), deadly(os.replace)
sys.exit(train.main(sys.argv))
"""


@pytest.mark.every_variant
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(tmp_path):
  # The noise, the dropout, the bias and the shares of the sources, which change after step 3, make
  # the result depend on the whole state.
  # Catches state that a checkpoint lacks (a moment, the bias, the key, the position in the data), a
  # batch that is read twice, a half-written checkpoint that is used, and metrics that are logged
  # twice.
  corpus = tmp_path / "corpus"
  argv = arguments(
    tmp_path,
    model__dropout=0.1,
    model__moe__jitter=0.01,
    model__moe__balancing__rule="sign",
    model__moe__balancing__rate=0.01,
    model__moe__dispatcher__name="grouped",
    data__sources=f"('text:{corpus}/*.txt', 'text:{corpus}/0*.txt')",
    data__dynamic__every=3,
    data__dynamic__references="(1.0, 2.0)",
  )[1:]
  elsewhere = [arg.replace(str(tmp_path / "run"), str(tmp_path / "whole")) for arg in argv]

  def run(args, stop):
    return execute(["-c", DRIVER, *args], STOP=stop)

  def sources():
    return {p: p.stat().st_mtime_ns for p in (ROOT / "moe_jax").rglob("*.py")}

  before = sources()
  whole = run(elsewhere, "NEVER 0")
  assert whole.returncode == 0 and "finished" in whole.stdout, whole.stderr
  for stop, code, expected in (
    ("KILL 2", -signal.SIGKILL, ""),
    ("TERM 3", 0, "stopped by SIGTERM after step 3 of 6"),
    ("SAVE 4", -signal.SIGKILL, ""),
    ("NEVER 0", 0, "finished"),
  ):
    done = run(argv, stop)
    assert done.returncode == code and expected in done.stdout, (stop, done.stdout, done.stderr)
    if stop == "SAVE 4":
      names = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
      assert "4" not in names and any(name.startswith("4.") for name in names), names
  assert sources() == before, (
    "moe_jax was edited while this test ran, so it compared two programs: run it again"
  )

  def lines(name):
    return [
      {k: v for k, v in line.items() if k != "tokens_per_second"}
      for line in metrics.read(tmp_path / name / "metrics.jsonl")
    ]

  assert lines("whole") == lines("run") and len(lines("run")) == 7
  one, other = (inspection.describe(tmp_path / name) for name in ("whole", "run"))
  assert (one["step"], one["starts"], other["starts"]) == (6, 1, 4)
  assert one["parameters_sha256"] == other["parameters_sha256"]

  # If one of Orbax's readers fails, it abandons the others. Their tracebacks only show in a
  # separate process.
  # Catches these tracebacks.
  for file in (tmp_path / "run" / "checkpoints" / "6" / "state").rglob("d/*"):
    os.truncate(file, 10)
  for command in (["-m", "moe_jax.train", *argv], ["-m", "moe_jax.inspect", str(tmp_path / "run")]):
    done = execute(command)
    assert (
      done.returncode == 2 and done.stderr.count("\n") == 1 and "checkpoints/6" in done.stderr
    ), done.stderr
