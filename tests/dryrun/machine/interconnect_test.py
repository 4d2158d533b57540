"""Tests where mesh axes lie on a machine, and the seconds of collectives worked out by hand."""

import types

import numpy as np
import pytest

from moe_jax.dryrun.machine.chips import CHIPS
from moe_jax.dryrun.machine.interconnect import Span, seconds, span

pytestmark = pytest.mark.unit
V4, V5E, V3, H100 = (CHIPS[kind] for kind in ("v4", "v5e", "v3", "h100"))


def mesh(shape, names, make):
  """Returns a stand-in for a mesh, whose device i has the attributes of `make(i)`."""
  devices = np.empty(int(np.prod(shape)), object)
  for i in range(devices.size):
    devices[i] = types.SimpleNamespace(**({"slice_index": None, "process_index": 0} | make(i)))
  return types.SimpleNamespace(axis_names=names, devices=devices.reshape(shape))


def torus(*sides):
  return lambda i: {"coords": [int(c) for c in np.unravel_index(i, sides)]}


def test_an_axis_lies_along_what_its_devices_span():
  # In 4 x 4 x 8 chips of v4 as a=4, b=32, b spans the last two dimensions completely. Catches axes
  # that are swapped, and rings whose ends are not connected.
  m = mesh((4, 32), ("a", "b"), torus(4, 4, 8))
  assert span(m, ("a",), V4) == Span("ici", ((4, True),))
  assert span(m, ("b",), V4) == Span("ici", ((4, True), (8, True)))
  # With b=2, c=16, b spans two neighbours of a ring, and the ends of this part are not connected.
  m = mesh((4, 2, 16), ("a", "b", "c"), torus(4, 4, 8))
  assert span(m, ("b",), V4) == Span("ici", ((2, False),))
  assert span(m, ("a", "b"), V4) == Span("ici", ((4, True), (2, False)))


def test_other_networks():
  # Catches slices that are joined by links which they do not have, data between two cores of a chip
  # that go over a link, and NVLink between hosts.
  slices = mesh((2, 4), ("a", "b"), lambda i: {"coords": [i % 4, 0], "slice_index": i // 4})
  assert span(slices, ("a",), V5E).network == "dcn" and span(slices, ("b",), V5E) == Span(
    "ici", ((4, False),)
  )
  cores = mesh((4, 2), ("a", "b"), lambda i: {"coords": [i // 2, 0]})
  assert span(cores, ("b",), V3) == Span("core")
  hosts = mesh((2, 8), ("a", "b"), lambda i: {"process_index": i // 8})
  assert span(hosts, ("a",), H100) == Span("dcn") and span(hosts, ("b",), H100) == Span("nvlink")


def test_seconds_by_hand():
  # A gather of 60 GB uses two links of 50e9 bytes/s on a ring, and one on a line. Catches the use
  # of one direction only, or of all links, and bits that are taken for bytes.
  assert seconds("all-gather", 60e9, 4, Span("ici", ((4, True),)), V4) == pytest.approx(0.6)
  assert seconds("all-gather", 60e9, 4, Span("ici", ((4, False),)), V4) == pytest.approx(1.2)
  assert seconds(
    "reduce-scatter", 60e9, 16, Span("ici", ((4, True), (4, True))), V4
  ) == pytest.approx(0.3)
  # In an all-to-all on a ring of 4, each device has B = 80 GB, of which 60 leave it. They go 1, 1
  # and 2 hops with B/4 each, which loads its two links with B in all. Catches distances that are
  # forgotten, and wire bytes that are taken for B.
  assert seconds("all-to-all", 60e9, 4, Span("ici", ((4, True),)), V4) == pytest.approx(
    80e9 / 2 / 50e9
  )
  # On 8 x 8 chips the load of each ring of 8 is B. On a line of 2, half of B crosses the only link.
  assert seconds("all-to-all", 63e9, 64, Span("ici", ((8, True), (8, True))), V4) == pytest.approx(
    64 / 50
  )
  assert seconds("ragged-all-to-all", 5e9, 2, Span("ici", ((2, False),)), V4) == pytest.approx(
    5 / 50
  )
  assert seconds("collective-permute", 50e9, 4, Span("ici", ((4, True),)), V4) == pytest.approx(1.0)


def test_shared_links_and_slow_networks():
  # Catches that each of v3's two cores gets all links of its chip, and that an unknown network is
  # taken for an infinitely fast one.
  assert seconds("all-gather", 70e9, 32, Span("ici", ((32, True),)), V3) == pytest.approx(1.0)
  assert np.isnan(seconds("all-reduce", 1e9, 2, Span("dcn"), V3))
  assert seconds("all-reduce", 50e9, 2, Span("dcn"), H100) == pytest.approx(1.0)
  assert seconds("all-to-all", 450e9, 8, Span("nvlink"), H100) == pytest.approx(1.0)
