import re

import numpy as np
import pytest

from moe_jax.report import tables
from moe_jax.report.colours import load_pixels

pytestmark = pytest.mark.unit


def test_cells_have_the_share_and_the_colour_of_the_ratio():
  # Catches colours of shares in place of ratios, a row without tokens, and names that are no HTML.
  text = tables.expert_table("kind", ["<a>", "b", "c"], np.array([[3, 1], [0, 0], [1, 3]]))
  assert re.findall(r"<td>(.*?)</td>", text) == ["&lt;a&gt; (4)", "c (4)"]
  assert re.findall(r">(\d+)</td>", text) == ["75", "25", "25", "75"]
  (brown,) = load_pixels(np.array([[1.5]]))[0]
  colour = "#" + "".join(f"{channel:02x}" for channel in brown.tolist())
  assert re.findall(r"background:(#\w+)", text)[0] == colour
