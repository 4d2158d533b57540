import numpy as np
import pytest

from moe_jax.data.rows import Rows, batch, process_rows
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def test_batch_by_hand():
  # Catches segments or positions that do not restart at a boundary, and segments that start at 0.
  tokens = np.array([[5, 6, 9, 1, 2, 9], [9, 1, 9, 9, 2, 3]])
  out = batch(tokens, boundary=9)
  assert out["inputs"].tolist() == [[5, 6, 9, 1, 2], [9, 1, 9, 9, 2]]
  assert out["targets"].tolist() == [[6, 9, 1, 2, 9], [1, 9, 9, 2, 3]]
  assert out["segment_ids"].tolist() == [[1, 1, 2, 2, 2], [1, 1, 2, 3, 3]]
  assert out["positions"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 1]]
  assert {x.dtype for x in out.values()} == {np.dtype(np.int32)}


def test_padding_is_zero_everywhere():
  # Catches padding whose segment is not 0, so that it would count in the loss.
  out = batch(
    np.array([[9, 1, 2, 3], [4, 9, 1, 2], [5, 5, 5, 5]]), boundary=9, valid=np.array([3, 1, 0])
  )
  assert out["segment_ids"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
  assert out["inputs"].tolist() == [[9, 1, 2], [4, 0, 0], [0, 0, 0]]
  assert out["targets"].tolist() == [[1, 2, 3], [9, 0, 0], [0, 0, 0]]
  assert out["positions"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]


def test_processes_own_contiguous_blocks():
  # Catches interleaved rows, with which the global array would depend on the number of processes.
  assert [process_rows(6, i, 3) for i in range(3)] == [Rows(0, 2, 6), Rows(2, 2, 6), Rows(4, 2, 6)]
  assert [Rows(2, 2, 6).index(i) for i in range(5)] == [2, 3, 8, 9, 14]
  assert process_rows(6) == Rows(0, 6, 6)  # The tests run in one JAX process.


@pytest.mark.parametrize("size", [6, 2, 0])
def test_batch_that_does_not_divide(size):
  # Catches rows that are dropped or read twice.
  with pytest.raises(
    ConfigError, match=f"train.batch_size={size}: .* 4 processes, e.g. {8 if size == 6 else 4}"
  ):
    process_rows(size, 0, 4)
