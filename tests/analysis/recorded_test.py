import planted
import pytest

from moe_jax.analysis.recorded import blocks, rows_per_domain

pytestmark = pytest.mark.unit


def test_blocks_are_stretches_of_every_domain():
  # Catches a block that holds one domain only, so that leaving it out would leave the domain out.
  recorded = planted.record(planted.by_nothing, rows=4, length=2)
  assert rows_per_domain(recorded) == [4, 4]
  assert blocks(recorded, 2).tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
