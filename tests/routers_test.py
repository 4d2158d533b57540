"""Tests the tables of routers and presets, and that docs/routers.md contains them."""

import pathlib

import pytest

from moe_jax import routers
from moe_jax.assembly import PRESETS
from moe_jax.errors import ConfigError
from moe_jax.routing import ROUTERS

pytestmark = pytest.mark.unit

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "routers.md"


def test_the_page_has_the_tables(capsys):
  # Catches a router, option or docstring that changed without `python -m moe_jax.routers --write
  # docs/routers.md`.
  assert routers.main(["routers"]) == 0
  printed = capsys.readouterr().out.strip()
  tables = [routers.router_table(), routers.preset_table()]
  assert printed == "\n\n".join(tables)
  text = PAGE.read_text()
  for name, table in zip(("routers", "presets"), tables, strict=True):
    assert routers.replace(text, name, table) == text, (
      "run python -m moe_jax.routers --write docs/routers.md"
    )
  assert printed.count("\n| `") == len(ROUTERS) + len(PRESETS)


def test_values_at_balance_and_collapse():
  # The values at collapse follow from the definitions in losses.py with E = 16: balance is E/K for
  # gshard (K = 2), load is E/K - 1 for noisy top-4, importance is E - 1, and the losses of
  # device_limited are 8/3 with 8 devices of which 3 are used.
  # Catches a loss of another scale, and a loss that is computed with the K of another router.
  value = routers.balance_values
  assert value("gshard") == "balance 1 → 8"
  assert value("noisy_top_k") == value("hierarchical") == "importance 0 → 15, load 0 → 3"
  assert value("device_limited") == "balance 1 → 2.667, device 1 → 2.667, communication 1 → 2.667"
  assert value("expert_choice") == "none"


def test_docstrings():
  def mine(logits, context):
    """Does things.

    Paper: A paper
    (Sec. 1).

        a = b,
        c = d
    """

  assert routers.paper(mine) == "A paper (Sec. 1)" and routers.equation(mine) == "a = b; c = d"
  for router in ROUTERS.values():
    assert "rXiv" in routers.paper(router.route) or "1991" in routers.paper(router.route)
  for broken in (routers.paper, routers.equation):
    with pytest.raises(ValueError, match="docstring"):
      broken(lambda logits, context: None)


def test_writing(tmp_path, capsys):
  # Catches a file without markers that is overwritten, and a traceback for a missing file.
  file = tmp_path / "a.md"
  file.write_text("nothing")
  assert routers.main(["routers", f"--write={file}"]) == 2 and file.read_text() == "nothing"
  assert routers.main(["routers", f"--write={tmp_path / 'no.md'}"]) == 2
  assert capsys.readouterr().err.count("error: ") == 2
  with pytest.raises(ConfigError, match="table:x"):
    routers.replace("", "x", "")
  assert routers.replace("a\n<!-- table:x -->\nold\n<!-- /table:x -->\nb", "x", "| new |") == (
    "a\n<!-- table:x -->\n| new |\n<!-- /table:x -->\nb"
  )
