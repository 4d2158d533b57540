"""Tests a plan from the config to the report, for four chips that are not attached."""

import importlib.util
import json

import pytest
import tiny

from moe_jax.dryrun import plan
from moe_jax.dryrun.machine import topology
from moe_jax.dryrun.page import document

pytestmark = pytest.mark.smoke
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[dryrun]'"
)


def test_what_is_asked(tmp_path):
  # Catches a mesh in the report that still has -1, and rows that are counted as tokens.
  config = tiny.config(tmp_path, mesh__data=-1, train__batch_size=8)
  asked = plan.asked(config, "x.py", topology.parse("v5e:2x2"), True)
  assert asked["mesh"]["data"] == 4 and asked["tokens"] == 8 * 32 and asked["mode"] == "fast"


@needs_libtpu
def test_a_report(tmp_path, monkeypatch):
  # Catches FLOPs of all devices instead of one, collectives without a mesh axis, an exchange that
  # is far from the formula, and figures that JSON cannot represent.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  config = tiny.config(
    tmp_path,
    mesh__data=1,
    mesh__expert=4,
    train__batch_size=8,
    model__vocab_size=264,
    model__moe__dispatcher__name="all_to_all",
    model__moe__capacity_factor=2.0,
  )
  report = plan.plan(config, "x.py", topology.parse("v5e:2x2"), True)
  assert report["fits"] and report["label"] == "compiler estimate, not measured"
  assert 0.5 < report["flops"]["program"] / report["flops"]["ideal"] < 4
  assert {"expert"} <= {m["axes"] for m in report["collectives"]} <= {"expert", "?"}
  assert report["exchange"]["program"] == pytest.approx(report["exchange"]["formula"], rel=0.35)
  # The cycles of fast mode are far too high, and so they are not reported.
  assert 0 < report["roofline"]["mfu"] < 1 and report["roofline"]["cycles"] is None
  assert sum(report["expected"].values()) < report["memory"]["available"]
  json.dumps(document.plain(report), allow_nan=False)
