import re

import numpy as np
import pytest

from moe_jax.report import kinds
from moe_jax.report.tables import MOST_EXPERTS

pytestmark = pytest.mark.unit


def test_the_section_has_a_table_a_layer():
  # Catches layers that show the experts of another one, and shares over experts instead of kinds.
  pieces, chosen = ["a", "b", "1", None], np.array([[0, 1, 1, 2], [1, 1, 0, 0]])
  text = kinds.kinds_section(pieces, chosen, 2, ["layer <1>", "layer 3"])
  tables = re.findall(r"<table.*?</table>", text)
  # In layer 3, expert 1 has the letters and expert 0 the others: of an entropy of 1.5 ln 2, ln 2.
  assert "reduces the uncertainty (entropy) about the token's kind by 66.7%; with shuffled" in text
  assert len(tables) == 2 and "layer &lt;1&gt;" in text
  rows = [dict(re.findall(r"<tr><td>([\w-]+) \(\d+\)</td>(.*?)</tr>", table)) for table in tables]
  cells = [
    {name: re.findall(r">([\d.]+)</td>", row) for name, row in table.items()} for table in rows
  ]
  assert cells[0] == {"lower-case": ["50", "50"], "number": ["0", "100"]}
  assert cells[1] == {"special": ["100", "0"], "lower-case": ["0", "100"], "number": ["100", "0"]}
  assert kinds.kinds_section(pieces, chosen, MOST_EXPERTS + 1, ["1", "3"]) == ""
