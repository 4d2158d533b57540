import numpy as np
import pytest

from moe_jax.data.mixture import Stretch, drawn, local_rows, mix, next_stretch, weights
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


@pytest.mark.parametrize(
  "shares", [[0.5, 0.3, 0.2], [0.2, 0.0, 0.8], [1e-30, 0.4, 0.6], [1 / 3, 1 / 3, 1 / 3]]
)
def test_the_records_that_were_drawn_are_counted(shares):
  # Catches a formula that differs from what Grain does, so that a source would repeat or skip
  # records when the shares change.
  dataset, counts = _mix(shares), [0, 0, 0]
  for i in range(300):
    assert drawn(shares, i) == counts
    counts["abc".index(dataset[i][0])] += 1


def test_sources_go_on_where_they_stood():
  # In the first 10 records with shares of 1/2, 3/10 and 1/5 there are 5, 3 and 2. Catches a source
  # that begins anew, or in another order, when the shares change, and shares that are not exact
  # afterwards.
  records = [[f"{name}{i}" for i in range(20)] for name in "abc"]
  sources = _sources(*"abc")
  second = next_stretch(Stretch((0.5, 0.3, 0.2), 0, (0, 0, 0)), [0.1, 0.1, 0.8], 5, 2)
  assert second == Stretch((0.1, 0.1, 0.8), 5, (5, 3, 2))
  third = next_stretch(second, [0.2, 0.4, 0.4], 10, 2)
  assert third == Stretch((0.2, 0.4, 0.4), 10, (6, 4, 10))
  alone = [mix([r], [1.0], [s], 0) for r, s in zip(records, sources, strict=True)]
  mixed = mix(records, second.shares, sources, 0, second.read)
  found = [mixed[i] for i in range(50)]
  for name, whole, read, share in zip("abc", alone, second.read, (5, 5, 40), strict=True):
    assert [r for r in found if r[0] == name] == [whole[read + i] for i in range(share)]


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
