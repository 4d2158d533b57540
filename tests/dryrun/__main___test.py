"""Tests the command: its flags, its exit codes and its errors of one sentence."""

import ctypes
import subprocess
import sys

import canned
import pytest

from moe_jax.commands import allocator
from moe_jax.dryrun import __main__ as command
from moe_jax.dryrun import plan, search
from moe_jax.dryrun.page import document

pytestmark = pytest.mark.unit
GLAM = ["--config=configs/glam.py:64b_64e", "--topology=v4:8x8x16"]


def test_a_plan_that_fits(tmp_path, monkeypatch, capsys):
  # Catches flags that are not passed on, a workdir that is ignored, and a code of 1 if the step
  # fits.
  seen = {}

  def made(config, path, machine, fast):
    seen.update(
      mesh=dict(config.mesh), steps=config.train.accumulate_steps, machine=str(machine), fast=fast
    )
    return canned.report()

  monkeypatch.setattr(plan, "plan", made)
  arguments = [
    *GLAM,
    "--mesh=fsdp=4,expert=64,tensor=4",
    "--fast",
    "--slices",
    "2",
    f"--workdir={tmp_path}",
    "--config.train.accumulate_steps=2",
  ]
  assert command.main(["dryrun", *arguments]) == 0
  assert seen == {
    "mesh": {"data": 1, "fsdp": 4, "expert": 64, "tensor": 4},
    "steps": 2,
    "machine": "2 x v4:8x8x16",
    "fast": True,
  }
  out = capsys.readouterr().out
  assert (
    "matmuls binds" in out
    and str(tmp_path / "report.html") in out
    and (tmp_path / "report.json").exists()
  )


# GLaM's mesh on v4:8x8x16 in docs/paper_scale.md.
GLAMS = {"data": 1, "fsdp": 4, "expert": 64, "tensor": 4}
# The mesh of configs/base.py, in which data takes all devices that are left.
ALL_LEFT = {"data": -1, "fsdp": 1, "expert": 1, "tensor": 1}


@pytest.mark.parametrize(
  "arguments, mesh",
  [
    (GLAM, GLAMS),
    ([*GLAM, "--config.model.moe.dispatcher.name=einsum"], GLAMS),
    ([*GLAM, "--mesh=expert=1024"], ALL_LEFT | {"data": 1, "expert": 1024}),
    ([*GLAM, "--config.mesh.tensor=2"], ALL_LEFT | {"tensor": 2}),
    ([*GLAM, "--config.mesh.data=-1"], ALL_LEFT),
    ([*GLAM, "--slices=2"], ALL_LEFT),
    ([GLAM[0], "--topology=v4:8x8x8"], ALL_LEFT),
    (["--config=configs/glam.py:8b_64e", GLAM[1]], ALL_LEFT),
  ],
)
def test_which_mesh(tmp_path, monkeypatch, capsys, arguments, mesh):
  # Catches a copy of the whole model on each device although the table has a mesh that fits, and
  # the table's mesh if the command sets another, if the machine is another, or if it is not
  # reported.
  seen = []
  monkeypatch.setattr(
    plan, "plan", lambda config, *rest: seen.append(dict(config.mesh)) or canned.report()
  )
  assert command.main(["dryrun", *arguments, f"--workdir={tmp_path}"]) == 0 and seen == [mesh]
  assert ("mesh is that of docs/paper_scale.md" in capsys.readouterr().out) == (mesh == GLAMS)


def test_one_that_does_not_is_one_sentence_and_code_1(tmp_path, monkeypatch, capsys):
  # Catches success that is reported for a run that would fail.
  monkeypatch.setattr(plan, "plan", lambda *arguments: canned.too_large())
  assert command.main(["dryrun", *GLAM, f"--workdir={tmp_path}"]) == 1
  err = capsys.readouterr().err
  assert (
    err.startswith("error: does not fit; needs 40.00 GiB")
    and "--search" in err
    and err.count("\n") == 1
  )


def test_a_search(tmp_path, monkeypatch, capsys):
  # Catches a limit that is not passed on, and success if nothing fits.
  limits = []
  answers = [[canned.report(words="data=8")], [canned.too_large() | {"words": "data=8"}]]
  monkeypatch.setattr(
    search, "search", lambda config, path, machine, limit: limits.append(limit) or answers.pop(0)
  )
  place = f"--workdir={tmp_path}"
  assert (
    command.main(["dryrun", *GLAM, "--search=3", place]) == 0
    and "data=8" in capsys.readouterr().out
  )
  assert command.main(["dryrun", *GLAM, "--search", place]) == 1 and limits == [3, command.COMPILES]
  assert (tmp_path / "search.json").exists()


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], ["config=None"]),
    (GLAM[:1], ["topology=None", "--topology=v4:8x8x16"]),
    ([*GLAM, "--topolgy=v4:4x4x4"], ["did you mean --topology?"]),
    ([*GLAM, "--mesh=data"], ["mesh='data'", "data=4,expert=64"]),
    ([*GLAM, "--mesh=expret=4"], ["data, fsdp, expert, tensor"]),
    ([*GLAM, "--slices=0"], ["slices='0'", "at least 1"]),
    ([*GLAM, "--fast=no"], ["must be --fast alone"]),
    ([*GLAM, "--search", "--mesh=data=4"], ["leave one of the two out"]),
    ([*GLAM, "--mesh=data=3,expert=4"], ["nearest"]),
    ([*GLAM, "--config.model.remat=half"], ["model.remat='half'"]),
  ],
)
def test_a_mistake_is_one_sentence_and_code_2(capsys, arguments, words):
  # Catches a traceback, and minutes of work before a mistyped flag is refused.
  assert command.main(["dryrun", *arguments]) == 2
  out, err = capsys.readouterr()
  assert not out and err.count("\n") == 1 and all(word in err for word in words), err


def test_where_it_is_written_by_itself(monkeypatch, tmp_path):
  # Catches a colon or a blank in a folder's name.
  assert (
    command.default_workdir("configs/glam.py:64b_64e", "2 x v4:8x8x16")
    == "runs/dryrun/glam_64b_64e-2xv4_8x8x16"
  )
  assert document.plain({"a": [float("inf")]}) == {"a": [None]}


# Eight threads hold memory at the same time. Then malloc_info lists the heaps from which they got
# it.
THREADS = """
import ctypes, sys, threading
from moe_jax.dryrun import __main__ as command
libc = ctypes.CDLL(None)
if sys.argv[1] == "few":
  command.main(["dryrun", "--help"])
together = threading.Barrier(8)
def allocate():
  kept = bytearray(5000)
  together.wait()
  return kept
threads = [threading.Thread(target=allocate) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), "malloc_info"), reason="a C library without malloc_info"
)
def test_threads_share_the_heaps(tmp_path):
  # Catches a limit that is never set, that is set too late, or that the C library refuses.
  def heaps(mode):
    subprocess.run(
      [sys.executable, "-c", THREADS, mode, str(tmp_path / mode)], check=True, capture_output=True
    )
    return (tmp_path / mode).read_text().count("<heap nr=")

  assert heaps("few") <= allocator.SPARING_ARENAS < heaps("many")
