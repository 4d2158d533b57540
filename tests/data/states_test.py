"""Tests that the position in the data is validated before a run resumes from it."""

import pytest

from moe_jax.data import batches_of, states
from moe_jax.data.mixture import Stretch
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
WINDOWS = {"pipeline": "windows", "batches": 6}
STREAM = {
  "pipeline": "stream",
  "batch_size": 2,
  "rows": {"0": [3, 4], "1": [0, 2**40]},
  "batches": 7,
}


def test_whole_states():
  # Catches rows that are sorted by their names as text, a number of batches that is ignored, and
  # old states that are refused.
  assert states.windows(WINDOWS) == batches_of(WINDOWS) == 6
  positions, batches = states.stream(STREAM, 2)
  assert positions.tolist() == [[3, 4], [0, 2**40]] and batches == batches_of(STREAM) == 7
  rows = {str(i): [i, 0] for i in range(12)}
  positions, batches = states.stream({"pipeline": "stream", "batch_size": 12, "rows": rows}, 12)
  assert positions[:, 0].tolist() == list(range(12)) and batches is None


STRETCH = {"shares": [0.25, 0.75], "start": 4, "read": [3, 9]}


def test_stretches_of_windows():
  # Catches a static position that is refused, and fields that are exchanged.
  assert states.stretch(WINDOWS, 2) is None
  assert states.stretch(WINDOWS | {"stretch": STRETCH}, 2) == Stretch((0.25, 0.75), 4, (3, 9))
  with pytest.raises(ConfigError, match="each of the 3 sources"):
    states.stretch(WINDOWS | {"stretch": STRETCH}, 3)


@pytest.mark.parametrize(
  "wrong",
  [
    None,
    {},
    *(STRETCH | {"shares": x} for x in (None, [1.0], [1, 0], [-1.0, 2.0], [0.0, 0.0], ["a", 1.0])),
    STRETCH | {"shares": [float("nan"), 1.0]},
    *(STRETCH | {"start": x} for x in (None, -1, 2.0, 7)),
    *(STRETCH | {"read": x} for x in (None, [1], [1, -1], [1, 2.0])),
  ],
)
def test_wrong_stretches(wrong):
  # Catches a damaged position that shows as an error of NumPy or Grain, or that trains on.
  with pytest.raises(ConfigError, match="^checkpoint='data position': "):
    states.stretch(WINDOWS | {"stretch": wrong}, 2)


@pytest.mark.parametrize(
  "wrong",
  [
    None,
    [],
    3,
    {},
    {"batches": 2},
    {"pipeline": "windos", "batches": 2},
    {"pipeline": ["windows"], "batches": 2},
    {"pipeline": "windows"},
    *(
      {"pipeline": "windows", "batches": n}
      for n in (-1, 2.0, "6", None, True, [6], 2**63, float("nan"))
    ),
  ],
)
def test_wrong_states_of_windows(wrong):
  # Catches a KeyError, a negative number of batches, True that is read as 1, and 2.0 or "6" that is
  # accepted as an integer.
  for read in (states.windows, batches_of):
    with pytest.raises(
      ConfigError, match="^checkpoint='data position': .*(windows or stream|number of batches)"
    ):
      read(wrong)


@pytest.mark.parametrize(
  "change",
  [
    {"batch_size": None},
    {"batch_size": "2"},
    {"batch_size": True},
    {"rows": None},
    {"rows": []},
    {"rows": {"0": [0, 0]}},
    {"rows": {"0": [0, 0], "1": [0, 0], "2": [0, 0]}},
    {"rows": {"0": [0, 0], "x": [0, 0]}},
    {"batches": -1},
    {"batches": True},
    *(
      {"rows": {"0": [0, 0], "1": place}}
      for place in (
        None,
        5,
        [],
        [1],
        [1, 2, 3],
        "12",
        [-1, 0],
        [0, -1],
        [0.0, 0],
        [0, "1"],
        [True, 0],
        [0, 2**63],
        {"0": 1, "1": 2},
      )
    ),
  ],
)
def test_wrong_states_of_stream(change):
  # Catches a KeyError for a missing row, negative documents that are read from the end, and
  # positions that are truncated to integers.
  with pytest.raises(ConfigError, match="^checkpoint='data position': "):
    states.stream(STREAM | change, 2)


def test_another_pipeline_or_batch_size():
  # Catches a remedy that cannot be pasted into the command, and rows that continue the documents of
  # other rows.
  with pytest.raises(ConfigError, match="data.pipeline='windows': .*--config.data.pipeline=stream"):
    states.windows(STREAM)
  with pytest.raises(ConfigError, match="data.pipeline='stream': .*--config.data.pipeline=windows"):
    states.stream(WINDOWS, 2)
  with pytest.raises(ConfigError, match="train.batch_size=4: .* batches of 2"):
    states.stream(STREAM, 4)
