"""Tests that groups of devices are read in all notations of HLO."""

import pytest

from moe_jax.hlo import notations

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "text, groups",
  [
    ("replica_groups={{0,2},{1,3}}, x={1}", ((0, 2), (1, 3))),
    ("replica_groups={{0,1,2},{3}}", ((0, 1, 2), (3,))),
    ("replica_groups={}, channel_id=1", ()),
    ("replica_groups=[2,4]<=[8], dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=[4,2]<=[2,2,2]T(1,2,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", ((0, 2), (4, 6), (1, 3), (5, 7))),
    (
      "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}, y",
      ((0, 1), (2, 3), (4, 5), (6, 7)),
    ),
    ("replica_groups=mesh['a'=2,'b'=4] {'b','a'}", (tuple(range(8)),)),
    (
      "replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([4,2]T(1,0)) {'a'}",
      ((0, 1), (2, 3), (4, 5), (6, 7)),
    ),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", ((3, 2), (1, 0))),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ("source_target_pairs={{0,1},{1,2},{2,0},{5,4}}", ((0, 1, 2), (5, 4))),
    ("source_target_pairs={{0,1},{2,3},{1,2}}", ((0, 1, 2, 3),)),
  ],
)
def test_notations(text, groups):
  # Catches transposes in the wrong order, parts of axes that are counted from the wrong end, and
  # chains of pairs that are cut.
  [(notation, match)] = [(n, m) for n in notations.READERS if (m := n.search(text))]
  assert notations.READERS[notation](match.groups()) == groups


@pytest.mark.parametrize(
  "target, groups",
  [
    ('"{1,2}x{0:3}"', ((0, 4),)),
    ("{{100000,200000},{100001,200001}}", ((0, 4), (1, 5))),
    ("{{100003->200003}}", ((3, 7),)),
  ],
)
def test_slices(target, groups):
  # Catches slices that are counted from 0, and a pair that is read as one number.
  found = notations.SLICES.search(
    f'_xla_megascale_target={target},_xla_megascale_transfer_type="ALL_REDUCE"'
  )
  assert notations.slices(found[1], 4) == groups
