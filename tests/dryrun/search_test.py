"""Tests the candidates and the ranking of the search, without a compiler."""

import math

import canned
import jax
import pytest
import tiny

from moe_jax.dryrun import plan, search
from moe_jax.dryrun.machine import topology
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def test_all_meshes_of_a_machine():
  # There are C(6, 3) = 20 ways to share the factors of 8 = 2^3 among four axes. Catches meshes that
  # leave devices idle, and an odd factor along another axis than data.
  found = list(search.meshes(8))
  assert len(found) == 20 and all(math.prod(sizes.values()) == 8 for sizes in found)
  assert {sizes["data"] % 7 for sizes in search.meshes(28)} == {0}
  assert all(sizes["data"] % 2 == 0 for sizes in search.meshes(8, slices=2))


def test_candidates_suit_the_model(tmp_path):
  # With 4 experts, 2 heads and 8 rows, expert=8 and tensor=4 do not divide. Catches candidates that
  # could not run, estimates that do not fall when more devices share the work, and changes that do
  # not agree with their description.
  config = tiny.config(tmp_path, train__batch_size=8, model__vocab_size=264)
  found = list(search.candidates(config, topology.parse("v5e:2x4"), jax.devices()))
  assert found and all(
    c.changes["mesh.expert"] <= 4 and c.changes["mesh.tensor"] <= 2 for c in found
  )
  assert {c.changes["model.remat"] for c in found} == {"none", "dots", "full"}
  memory = {c.words: c.memory for c in found}
  assert memory["fsdp=8, 1 microbatches, remat=none"] < memory["data=8, 1 microbatches, remat=none"]
  assert (
    memory["fsdp=4 tensor=2, 2 microbatches, remat=full"]
    < memory["fsdp=4 tensor=2, 1 microbatches, remat=none"]
  )
  assert all(c.seconds > 0 for c in found)


def test_the_fastest_that_fits_comes_first(tmp_path, monkeypatch):
  # Catches a ranking by the rough formula, candidates that do not fit among those that do, and more
  # compilations than were asked for.
  config = tiny.config(tmp_path, train__batch_size=8, model__vocab_size=264)
  monkeypatch.setattr(search, "make_devices", lambda machine: jax.devices())
  some = [
    search.Candidate({"mesh.data": 8, "train.accumulate_steps": n}, str(n), 1.0, 1.0)
    for n in (8, 4, 2, 1)
  ]
  monkeypatch.setattr(search, "candidates", lambda *arguments: some)
  answers = iter(
    [
      canned.too_large(),
      canned.report(),
      canned.report(roofline=canned.report()["roofline"] | {"seconds": 1.0}),
    ]
  )
  monkeypatch.setattr(plan, "plan", lambda *arguments: next(answers))
  found = search.search(config, "x.py", topology.parse("v5e:2x4"), 3)
  # Of candidates with equal times, those with the fewest microbatches come first.
  assert sorted(report["words"] for report in found) == ["1", "2", "4"]
  assert [report["fits"] for report in found] == [True, True, False] and found[0]["roofline"][
    "seconds"
  ] == 1.0
  lines = search.table(found).splitlines()
  assert len(lines) == 4 and "not measured" in lines[0] and "does not fit" in lines[3]


def test_nothing_can_fit(tmp_path, monkeypatch):
  # Catches an empty ranking without an explanation.
  config = tiny.config(tmp_path)
  monkeypatch.setattr(search, "make_devices", lambda machine: jax.devices())
  monkeypatch.setattr(
    search, "candidates", lambda *arguments: [search.Candidate({}, "all", 1e15, 1.0)]
  )
  with pytest.raises(ConfigError, match="no mesh"):
    search.search(config, "x.py", topology.parse("v5e:2x4"), 3)
