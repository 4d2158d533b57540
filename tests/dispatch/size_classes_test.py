"""Tests the chunks of loads: their sizes, the static bound on rows, and the layout in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.size_classes import cut, layout, most_rows, size_classes

pytestmark = pytest.mark.unit

LOADS = {
  "balanced": [128] * 8,
  "one expert": [0, 0, 1024, 0, 0, 0, 0, 0],
  "one row each": [1] * 8,
  "nobody": [0] * 8,
  "uneven": [3, 700, 0, 129, 64, 65, 55, 8],
  "just above a class": [145, 113, 129, 97, 81, 65, 37, 17],
}


def test_by_hand():
  # Catches sizes that do not scale with the balanced load, a missing smallest size, and a choice
  # that is not the cheapest.
  assert size_classes(1024, 8) == (8, 16, 32, 48, 64, 80, 96, 112, 128, 144)
  choice, chunks = cut(np.array([0, 8, 130, 288, 1024]), (8, 128, 144), np)
  assert list(chunks) == [
    0,
    1,
    1,
    2,
    8,
  ]  # 130 rows need one chunk of 144, not two of 128 or 17 of 8.
  assert list(choice[1:]) == [0, 2, 2, 1]


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_layout_covers_all_rows_in_order(loads):
  # Catches experts that overlap or leave gaps, classes out of order (so that chunks would destroy
  # finished rows), an expert in no class or in two, and a last chunk that exceeds the spare rows.
  where = jax.jit(layout, static_argnums=1)(jnp.array(loads), 1024)
  at = 0
  for position, e in enumerate(np.asarray(where.order)):
    classes = [
      m for m in range(len(where.classes)) if where.bounds[m] <= position < where.bounds[m + 1]
    ]
    assert len(classes) == (loads[e] > 0)
    if loads[e]:
      size, chunks = where.classes[classes[0]], int(where.chunks[e])
      assert int(where.first[e]) == at and (chunks - 1) * size < loads[e] <= chunks * size
      assert at + chunks * size <= 1024 + where.classes[-1]
    at += loads[e]
  trips = where.trips()
  computed = sum(trips[f"experts_of_{s}"] * trips[f"chunks_of_{s}"] * s for s in where.classes)
  assert sum(loads) <= computed <= most_rows(1024, 8)


@pytest.mark.parametrize(("rows", "experts"), [(8192, 8), (8192, 32), (49152, 64), (4096, 16)])
def test_rounding_costs_little(rows, experts):
  # At the benchmark's shapes, the computed rows exceed the assignments by at most 20 %, and on
  # average by at most 8 % for loads that are as uneven as those of routers. Catches too few size
  # classes, and a cost of chunks that is so high that loads are not split.
  assert most_rows(rows, experts) <= 1.2 * rows
  rng, classes = np.random.default_rng(0), size_classes(rows, experts)
  computed = []
  for _ in range(50):
    choice, chunks = cut(rng.multinomial(rows, rng.dirichlet(np.full(experts, 10.0))), classes, np)
    computed.append(np.sum(chunks * np.asarray(classes)[choice]))
  assert np.max(computed) <= most_rows(rows, experts)
  assert np.mean(computed) <= 1.08 * rows
