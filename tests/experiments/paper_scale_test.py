"""Checks that the rows of the dry runs suit their machines, and what their page says."""

import math
import sys

import canned
import pytest

from experiments.common import command_line, tables
from experiments.paper_scale import STUDY, describe, dry_runs, page, rows
from moe_jax import assembly, commands
from moe_jax.dryrun import __main__ as dryrun
from moe_jax.dryrun.machine import meshes, topology

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("name", rows.ROWS)
def test_rows_suit_their_machines(name):
  # Catches a mesh that its model or batch does not divide, or that leaves devices out, and a
  # misspelt key.
  flags, rest = commands.take_flags(rows.ROWS[name].arguments(), dryrun.FLAGS)
  config = commands.parse(["dryrun", *rest], workdir=False).config
  machine = topology.parse(flags["topology"])
  dryrun.set_mesh(config, flags["mesh"])
  assembly.validate(config, machine.num_devices)
  assert math.prod(config.mesh.values()) == machine.num_devices


def test_each_shipped_mesh_has_a_row():
  # Catches a mesh that a dry run takes by itself and that nobody has compiled.
  compiled = {
    (row.config.removeprefix("configs/").replace(".py", ""), row.topology)
    for row in rows.MODELS.values()
  }
  assert compiled == set(meshes.MESHES)


def line(name, **changes):
  report = canned.report(**changes)
  sums = {
    f"{moved['kind']} {moved['axes']}": moved["wire_bytes"] for moved in report["collectives"]
  }
  return {
    "row": name,
    "arguments": rows.ROWS[name].arguments(),
    "seconds": 44,
    "cpu_seconds": 60,
    "resident_bytes": 2 * canned.GIB,
    "wire_bytes": sums,
  } | report


def test_the_page_shows_what_fits_what_does_not_and_what_dispatchers_send():
  # Catches a column of another row, a row that does not fit without its reason, and a dispatcher
  # beside another's bytes.
  wide = {"exchange": {"formula": 10 * canned.GIB, "program": 25 * canned.GIB}}
  short = {
    key: value
    for key, value in (line("dbrx") | canned.too_large()).items()
    if key not in ("flops", "roofline", "collectives", "exchange", "paper")
  }
  made = page.make_tables(
    {
      "glam_64b_64e": line("glam_64b_64e"),
      "glam_64b_64e_einsum": line("glam_64b_64e_einsum", **wide),
      "dbrx": short | {"error": "does not fit; needs 40.00 GiB a device"},
    }
  )
  text = "\n".join(made.values())
  assert "16.0 of 32.0 (50%), 14.0 | 25 GiB | 3 / 1.5 / expert 1, data ? | matmuls |" in text
  assert (
    "40.0 of 32.0, 14.0: does **not** fit" in text
    and "- `dbrx`: does not fit; needs 40.00 GiB" in text
  )
  assert (
    "| `einsum` | 25 GiB | 10 GiB | 2.50 |" in text
    and "| `all_to_all` | 24 GiB | 23.6 GiB | 1.02 |" in text
  )
  assert "python -m moe_jax.dryrun --config=configs/glam.py:64b_64e --topology=v4:8x8x16" in text


def test_a_dry_run_that_ends_early_leaves_its_reason(tmp_path, monkeypatch):
  # Catches a traceback for a machine whose compiler is missing, and the whole log, or nothing, as
  # the reason.
  program = tmp_path / "python"
  program.write_text("#!/bin/sh\necho noise\necho 'error: topology=x: no compiler' >&2\nexit 2\n")
  program.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(program))
  found = dry_runs.dry_run("dbrx", rows.ROWS["dbrx"], tmp_path / "runs")
  assert (
    found["error"] == "topology=x: no compiler"
    and found["resident_bytes"] > 0
    and "fits" not in found
  )


def test_what_a_row_came_to():
  # Catches a row that does not fit and is called one that does.
  assert describe(line("glam_64b_64e"), "finished").startswith(
    "fits, 50% of the memory of a device; matmuls"
  )
  assert describe({"error": "does not fit"}, "does not fit") == "does not fit"


def test_rows_that_are_finished_are_not_compiled_again(tmp_path, monkeypatch):
  # Catches minutes of compiling for lines that are there, and a line of other arguments that stays.
  compiled = []

  def fake(name, row, workdir):
    compiled.append(name)
    return {"row": name, "arguments": row.arguments(), "error": "does not fit"}

  monkeypatch.setattr(dry_runs, "dry_run", fake)
  for scale in ("fast", "fast", "full"):
    chosen = command_line.choose_rows(rows.rows(scale), "dbrx")
    dry_runs.train(command_line.Job(scale, chosen, tmp_path / "results.jsonl", tmp_path))
  assert compiled == ["dbrx", "dbrx"]


def test_wrong_rows_are_named(capsys):
  # Catches an empty run that says nothing.
  def printed(*arguments):
    return command_line.main(["experiments", "paper_scale", "print", *arguments])

  assert printed("--only=gpt") == 2 and "rows: gshard_600b" in capsys.readouterr().err
  assert printed("--only=dbrx", "--set", "train.stepz=5") == 2
  assert "did you mean train.steps" in capsys.readouterr().err
  assert printed("--only=switch_c") == 0
  said = capsys.readouterr().out
  assert said.startswith("python -m moe_jax.dryrun --config=configs/switch.py:c ")
  assert said.endswith("--fast\n")


def test_the_page_shows_the_results():
  # Catches a table typed by hand, and results replaced without `python -m experiments paper_scale
  # write`.
  text = page.FILE.read_text()
  assert tables.replace_all(text, STUDY.table("fast")) == text
