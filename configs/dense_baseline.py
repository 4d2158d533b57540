"""The dense twins: the same model, data and training with one FFN in place of the K experts that a token visits.

  python -m moe_jax.train --config=configs/dense_baseline.py:quickstart --workdir=runs/dense_quickstart
  python -m moe_jax.train --config=configs/dense_baseline.py:desk --workdir=runs/dense_desk

Expected: a little behind the model with experts; the README has the tables. A test compares the FLOPs of both.
"""

from configs import desk, quickstart
from moe_jax.errors import choose

TWINS = {"quickstart": quickstart, "desk": desk}


def get_config(twin="quickstart"):
  c = choose("config", twin, TWINS).get_config()
  c.model.moe.num_experts = 0
  c.report.compare = f"experiments/embedded_corpus/{twin}.json"
  return c
