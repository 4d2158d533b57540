"""Tests the arithmetic of the roofline on an invented program."""

import dataclasses
import types

import numpy as np
import pytest

from moe_jax.dryrun.machine import roofline
from moe_jax.dryrun.machine.chips import CHIPS
from moe_jax.hlo.program import Collective, Program

pytestmark = pytest.mark.unit

V4 = CHIPS["v4"]  # 275 TFLOP/s, 1200 GB/s, links of 50 GB/s, 1.05 GHz
RING = np.array(
  [types.SimpleNamespace(coords=[i, 0, 0], slice_index=None) for i in range(4)], object
)
MESH = types.SimpleNamespace(axis_names=("expert",), devices=RING)
GATHER = Collective(
  kind="all-gather",
  axes=("expert",),
  group_size=4,
  bytes=4_000_000_000,
  wire_bytes=3e9,
  count=10.0,
  dtype="bf16",
  op_name="",
)


def program(**changes):
  made = Program(
    flops=275e12,
    flops_once=0.0,
    collectives=(GATHER,),
    hbm_bytes=600e9,
    cycles=2.1e9,
    unknown_loops=0,
  )
  return dataclasses.replace(made, **changes)


def bound(made):
  return roofline.bound(
    made, roofline.moved(made.collectives, MESH, V4), V4, 4, 1000, 550e12, 86_400
  )


def test_by_hand():
  # 275e12 FLOPs take 1 s, 600e9 bytes take 0.5 s, and 10 gathers of 3e9 bytes over two links take
  # 0.3 s. 550e12 ideal FLOPs on 4 devices of 275e12 FLOP/s are an MFU of 0.5. Catches executions
  # that are not multiplied, an MFU that uses the program's FLOPs, and days that are hours.
  found = bound(program())
  assert (found.matmuls, found.memory) == (1.0, 0.5)
  assert found.networks == {"expert": pytest.approx(0.3)}
  assert found.binds == "matmuls" and found.seconds == 1.0 and found.tokens_per_second == 1000
  assert (
    found.mfu == pytest.approx(0.5)
    and found.days == pytest.approx(1.0)
    and found.cycles == pytest.approx(2.0)
  )


def test_the_slowest_binds():
  # Catches that the first resource is always taken, and a network that is left out of the bound.
  assert bound(program(hbm_bytes=2400e9)).binds == "memory"
  slow = bound(program(collectives=(dataclasses.replace(GATHER, count=100.0),)))
  assert (
    slow.binds == "expert"
    and slow.seconds == pytest.approx(3.0)
    and slow.mfu == pytest.approx(0.5 / 3)
  )


def test_what_is_not_known_binds_nothing():
  # Catches NaN that is taken for the largest of three, and a division by a clock of 0.
  v3 = CHIPS["v2"]
  sent = [roofline.Moved("all-reduce", "data", 2, "dcn", 1.0, 1.0, 1.0, float("nan"))]
  found = roofline.bound(program(cycles=None), sent, v3, 4, 1000, 1e12, 1)
  assert found.binds == "matmuls" and np.isnan(found.networks["data"]) and found.cycles is None


def test_collectives_of_a_kind_and_axes_are_one_line():
  # Catches bytes that are summed without their counts, and kinds or axes that are mixed up.
  other = dataclasses.replace(GATHER, kind="all-reduce", count=1.0)
  found = roofline.moved([GATHER, dataclasses.replace(GATHER, count=5.0), other], MESH, V4)
  assert [(m.kind, m.count, m.wire_bytes) for m in found] == [
    ("all-gather", 15.0, 45e9),
    ("all-reduce", 1.0, 3e9),
  ]
  assert found[0].seconds == pytest.approx(0.45) and found[0].axes == "expert"
