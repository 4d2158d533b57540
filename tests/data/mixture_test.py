import numpy as np
import pytest

from moe_jax.data.mixture import local_rows, mix, weights
from moe_jax.data.rows import Rows
from moe_jax.data.sources import Source
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def _sources(*names):
  return [Source(name, "", {}) for name in names]


def _mix(shares, names="abc", seed=0, sizes=(70, 40, 30)):
  records = [[f"{name}{i}" for i in range(size)] for name, size in zip(names, sizes, strict=False)]
  return mix(records, shares, _sources(*names), seed)


def test_weights():
  # Catches shares that do not sum to 1 or that ignore the configured weights.
  a, b = _sources("a", "b")
  assert weights((), [a, b], [30, 10]) == [0.75, 0.25]
  assert weights((2, 3), [a, b], [30, 10]) == [0.4, 0.6]
  assert weights((0, 1), [a, b], [30, 10]) == [0, 1]


@pytest.mark.parametrize(
  "wrong", [(1,), (1, 2, 3), (1, -1), (0, 0), (1, float("nan")), (1, float("inf"))]
)
def test_wrong_weights(wrong):
  # Catches a source that zip() drops without an error, and Grain's own error, which does not name
  # the field.
  with pytest.raises(ConfigError, match="data.weights="):
    weights(wrong, _sources("a", "b"), [1, 1])


def test_shares_are_exact():
  # Catches proportions that Grain truncates (6/5 of 100 becomes 119), and a source that is left
  # out.
  dataset = _mix([0.5, 0.3, 0.2])
  counts = {name: sum(dataset[i][0] == name for i in range(1000)) for name in "abc"}
  assert counts == {"a": 500, "b": 300, "c": 200}
  dataset = _mix([5 / 11, 6 / 11], "ab")
  assert sum(dataset[i][0] == "a" for i in range(2200)) == 1000


def test_share_zero_is_never_drawn():
  # Catches Grain's error for a proportion of 0.
  assert {_mix([0.5, 0, 0.5])[i][0] for i in range(50)} == {"a", "c"}


def test_every_epoch_has_every_record_once_in_a_new_order():
  # Catches sampling with replacement, the same order in each epoch, and records that are not
  # shuffled.
  dataset = _mix([1.0], "a", sizes=(50,))
  first, second = ([dataset[i] for i in range(e * 50, e * 50 + 50)] for e in (0, 1))
  assert sorted(first) == sorted(second) == sorted(f"a{i}" for i in range(50))
  assert first != second and first != [f"a{i}" for i in range(50)]


def test_order_depends_on_the_seed_but_not_on_the_neighbours():
  # Catches seeds that depend on the position, so that a source that is added in front changes the
  # order of all others.
  alone, other = _mix([1.0], "b", sizes=(40,)), _mix([1.0], "b", seed=1, sizes=(40,))
  mixed = _mix([0.5, 0.3, 0.2], sizes=(70, 40, 30))
  of_b = [mixed[i] for i in range(100) if mixed[i][0] == "b"]
  assert [alone[i] for i in range(len(of_b))] == of_b
  assert [alone[i] for i in range(40)] != [other[i] for i in range(40)]


def test_order_of_files_follows_from_their_text_and_not_from_their_path():
  # Catches a corpus that is read in another order on another machine, or by another user.
  def order(*source):
    dataset = mix([range(40)], [1.0], [Source(*source, {})], 0)
    return [dataset[i] for i in range(40)]

  assert order("text:/a/*.txt", "f") == order("text:/b/*.txt", "f") != order("text:/a/*.txt", "g")
  assert order("jsonl:/a", "f") == order("jsonl:/b", "f")
  assert order("embedded:prose", "f") == order("embedded:prose", "g") != order("tfds:x", "f")


def test_rows_of_processes_make_the_global_batches():
  # Catches a process that starts at another batch or skips rows.
  dataset = _mix([0.5, 0.3, 0.2])
  local = [local_rows(dataset, Rows(first, 2, 6), start=3) for first in (0, 2, 4)]
  joined = np.concatenate(
    [np.array([rows[i] for i in range(4)]).reshape(2, 2) for rows in local], axis=1
  )
  assert joined.reshape(-1).tolist() == [dataset[i] for i in range(18, 30)]


def test_sources_of_one_size_have_orders_of_their_own():
  # Catches a seed that does not depend on the name of the source, so that sources of equal size are
  # read in the same order.
  a, b = (_mix([1.0], name, sizes=(40,)) for name in "ab")
  assert [int(a[i][1:]) for i in range(40)] != [int(b[i][1:]) for i in range(40)]
