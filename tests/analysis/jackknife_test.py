import math

import numpy as np
import planted
import pytest

from moe_jax.analysis import jackknife

pytestmark = pytest.mark.unit


def test_the_interval_of_a_mean_is_students():
  # For a mean of one number a block, the jackknife is the usual standard error of the mean.
  # Catches a wrong factor, and a normal quantile where there are few blocks.
  values = np.array([1.0, 2.0, 4.0, 5.0])
  without = np.array([np.delete(values, i).mean() for i in range(4)])
  error = values.std(ddof=1) / 2
  assert jackknife.half_width(without) == pytest.approx(3.182 * error)
  assert jackknife.half_width(np.zeros((1, 2))).tolist() == [math.inf] * 2


def test_every_token_is_left_out_once():
  # Catches a block that is never left out, and more blocks than rows.
  recorded = planted.record(planted.by_nothing, rows=25, length=2)
  masks = jackknife.without_each_block(recorded)
  assert len(masks) == jackknife.BLOCKS and (~np.stack(masks)).sum(axis=0).tolist() == [1] * 100
  assert len(jackknife.without_each_block(planted.record(planted.by_nothing, rows=3))) == 3
  assert jackknife.without_each_block(planted.record(planted.by_nothing, rows=1)) == []
  assert jackknife.replicates([], np.mean, (2,)).shape == (0, 2)
