"""Tests which rows each process reads, on invented layouts of devices over processes."""

import jax
import pytest

from moe_jax import sharding
from moe_jax.errors import ConfigError
from moe_jax.sharding.readers import reader_of

pytestmark = pytest.mark.unit


def readers(*held):
  return [reader_of(dict(enumerate(held)), process, {"data": 4}) for process in range(len(held))]


def test_each_process_reads_what_its_devices_hold():
  # Catches blocks in another order than the rows, processes that hold the same rows (as with
  # tensor=2 over both) but read different ones, so that one row has two contents, and wrong blocks
  # on a mesh whose devices were reordered, as on TPUs.
  assert readers({0, 1}, {2, 3}) == [(0, 2), (1, 2)]
  assert readers({0, 1}, {0, 1}, {2, 3}, {2, 3}) == [(0, 2), (0, 2), (1, 2), (1, 2)]
  assert readers({2, 3}, {0, 1}) == [(1, 2), (0, 2)]
  assert readers({0, 2}, {1, 3}) == [(0, 2), (1, 2)]


def test_layouts_that_cannot_be_read_are_refused():
  # Catches rows of which two processes read half each, and a process that reads for no device.
  with pytest.raises(ConfigError, match="a part of each other's rows; let tensor divide"):
    readers({0, 1}, {1, 2}, {2, 3})
  with pytest.raises(ConfigError, match="leaves process 1 without a device"):
    reader_of({0: {0}}, 1, {"data": 1})


def test_one_process_reads_everything():
  # Catches a reader that counts devices along tensor.
  for sizes in ({"data": 8}, {"data": 2, "expert": 2, "tensor": 2}, {"data": 1}):
    assert sharding.reader(sharding.make_mesh(sizes, jax.devices()[:8])) == (0, 1)
