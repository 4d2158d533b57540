"""Dry runs at the papers' scale: their rows suit their machines, and the page says what the lines
say."""

import math
import sys

import canned
import pytest

from experiments.paper_scale import __main__ as command
from experiments.paper_scale import page, rows
from moe_jax import assembly
from moe_jax.dryrun import __main__ as dryrun
from moe_jax.dryrun.machine import meshes, topology

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("name", rows.ROWS)
def test_rows_suit_their_machines(name):
  # Catches: a mesh that its model or batch does not divide, or that leaves devices out; a misspelt
  # key.
  flags, rest = dryrun.take_flags(["dryrun", *rows.ROWS[name].arguments()])
  config = commands.parse(rest, workdir=False).config
  machine = topology.parse(flags["topology"])
  dryrun.set_mesh(config, flags["mesh"])
  assembly.validate(config, machine.num_devices)
  assert math.prod(config.mesh.values()) == machine.num_devices


def test_each_shipped_mesh_has_a_row():
  # Catches: a mesh that a dry run takes by itself and that nobody has compiled.
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


def test_the_page_shows_what_fits_what_does_not_and_what_dispatchers_send(tmp_path, monkeypatch):
  # Catches: a column of another row, a row that does not fit without its reason, a dispatcher
  # beside another's bytes.
  monkeypatch.setattr(page, "FILE", tmp_path / "page.md")
  wide = {"exchange": {"formula": 10 * canned.GIB, "program": 25 * canned.GIB}}
  short = {
    key: value
    for key, value in (line("dbrx") | canned.too_large()).items()
    if key not in ("flops", "roofline", "collectives", "exchange", "paper")
  }
  page.write(
    {
      "glam_64b_64e": line("glam_64b_64e"),
      "glam_64b_64e_einsum": line("glam_64b_64e_einsum", **wide),
      "dbrx": short | {"error": "does not fit; needs 40.00 GiB a device"},
    }
  )
  text = (tmp_path / "page.md").read_text()
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
  # Catches: a traceback for a machine whose compiler is missing; the whole log, or nothing, as the
  # reason.
  program = tmp_path / "python"
  program.write_text("#!/bin/sh\necho noise\necho 'error: topology=x: no compiler' >&2\nexit 2\n")
  program.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(program))
  found = command.dry_run("dbrx", rows.ROWS["dbrx"], tmp_path / "runs", fast=True)
  assert (
    found["error"] == "topology=x: no compiler"
    and found["resident_bytes"] > 0
    and "fits" not in found
  )


def test_wrong_rows_are_named(capsys):
  # Catches: an empty run that says nothing.
  assert command.main(["--only=gpt"]) == 2 and "rows: gshard_600b" in capsys.readouterr().err
  assert command.main(["--only=switch_c", "--print"]) == 0
  assert capsys.readouterr().out.startswith(
    "python -m moe_jax.dryrun --config=configs/switch.py:c "
  )
