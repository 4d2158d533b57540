"""Seconds of collectives, worked out by hand, and where mesh axes lie."""

import types

import numpy as np
import pytest

from moe_jax.dryrun.machine.chips import CHIPS
from moe_jax.dryrun.machine.interconnect import Span, seconds, span

pytestmark = pytest.mark.unit
V4, V5E, V3, H100 = (CHIPS[kind] for kind in ("v4", "v5e", "v3", "h100"))


def mesh(shape, names, make):
  """Stands in for a mesh: what `make(i)` says of device i."""
  devices = np.empty(int(np.prod(shape)), object)
  for i in range(devices.size):
    devices[i] = types.SimpleNamespace(**({"slice_index": None, "process_index": 0} | make(i)))
  return types.SimpleNamespace(axis_names=names, devices=devices.reshape(shape))


def torus(*sides):
  return lambda i: {"coords": [int(c) for c in np.unravel_index(i, sides)]}


def test_an_axis_lies_along_what_its_devices_span():
  # 4 x 4 x 8 chips of v4 as a=4, b=32: b spans the last two dimensions whole. Catches: axes
  # swapped, ends not joined.
  m = mesh((4, 32), ("a", "b"), torus(4, 4, 8))
  assert span(m, ("a",), V4) == Span("ici", ((4, True),))
  assert span(m, ("b",), V4) == Span("ici", ((4, True), (8, True)))
  # b=2, c=16: b is half of a ring's neighbours, whose ends are not joined.
  m = mesh((4, 2, 16), ("a", "b", "c"), torus(4, 4, 8))
  assert span(m, ("b",), V4) == Span("ici", ((2, False),))
  assert span(m, ("a", "b"), V4) == Span("ici", ((4, True), (2, False)))


def test_other_networks():
  # Catches: slices joined by links they do not have; two cores of a chip sent over a link; NVLink
  # between hosts.
  slices = mesh((2, 4), ("a", "b"), lambda i: {"coords": [i % 4, 0], "slice_index": i // 4})
  assert span(slices, ("a",), V5E).network == "dcn" and span(slices, ("b",), V5E) == Span(
    "ici", ((4, False),)
  )
  cores = mesh((4, 2), ("a", "b"), lambda i: {"coords": [i // 2, 0]})
  assert span(cores, ("b",), V3) == Span("core")
  hosts = mesh((2, 8), ("a", "b"), lambda i: {"process_index": i // 8})
  assert span(hosts, ("a",), H100) == Span("dcn") and span(hosts, ("b",), H100) == Span("nvlink")


def test_seconds_by_hand():
  # A gather of 60 GB over a ring uses two links, over a line one: 50e9 each. Catches: one
  # direction, bits, all links.
  assert seconds("all-gather", 60e9, 4, Span("ici", ((4, True),)), V4) == pytest.approx(0.6)
  assert seconds("all-gather", 60e9, 4, Span("ici", ((4, False),)), V4) == pytest.approx(1.2)
  assert seconds(
    "reduce-scatter", 60e9, 16, Span("ici", ((4, True), (4, True))), V4
  ) == pytest.approx(0.3)
  # An all-to-all on a ring of 4, B = 80 GB a device, of which 60 leave it: hops 1, 1, 2 with B/4
  # each are B link-bytes a device over its two links. Catches: the distance forgotten; wire bytes
  # taken for B.
  assert seconds("all-to-all", 60e9, 4, Span("ici", ((4, True),)), V4) == pytest.approx(
    80e9 / 2 / 50e9
  )
  # On 8 x 8 the load of each ring of 8 is B; on a line of 2 half of B crosses the one link.
  assert seconds("all-to-all", 63e9, 64, Span("ici", ((8, True), (8, True))), V4) == pytest.approx(
    64 / 50
  )
  assert seconds("ragged-all-to-all", 5e9, 2, Span("ici", ((2, False),)), V4) == pytest.approx(
    5 / 50
  )
  assert seconds("collective-permute", 50e9, 4, Span("ici", ((4, True),)), V4) == pytest.approx(1.0)


def test_shared_links_and_slow_networks():
  # Catches: each of v3's two cores given the whole chip's links; an unknown network taken for an
  # infinite one.
  assert seconds("all-gather", 70e9, 32, Span("ici", ((32, True),)), V3) == pytest.approx(1.0)
  assert np.isnan(seconds("all-reduce", 1e9, 2, Span("dcn"), V3))
  assert seconds("all-reduce", 50e9, 2, Span("dcn"), H100) == pytest.approx(1.0)
  assert seconds("all-to-all", 450e9, 8, Span("nvlink"), H100) == pytest.approx(1.0)
