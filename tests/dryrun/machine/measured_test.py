"""Tests that the papers' figures belong to configs that exist."""

import pytest

from moe_jax import commands
from moe_jax.dryrun.machine import measured

pytestmark = pytest.mark.unit


def test_each_figure_is_of_a_config():
  # Catches a misspelt variant, whose figure would never be shown.
  for name in measured.TABLE:
    family, _, variant = name.partition(":")
    commands.load_config(f"configs/{family}.py:{variant}")


def test_found_by_the_path_on_the_command_line():
  # The paper gives 0.72 steps per second (Table 3). Catches the rate instead of its inverse, and a
  # path with folders that is not found.
  found = measured.find("configs/gshard.py:600b")
  assert found.seconds == pytest.approx(1.389, rel=1e-3) and "2048" in found.machine
  assert measured.find("configs/mixtral.py:8x7b") is None
