"""The dense twins: the same model, data and training with one FFN in place of the K experts that a token visits.

  python -m moe_jax.train --config=configs/dense_baseline.py:quickstart --workdir=runs/dense_quickstart
  python -m moe_jax.train --config=configs/dense_baseline.py:desk --workdir=runs/dense_desk

A test compares the activated FLOPs of twin and model (they differ by the router alone).
"""

from configs import desk, quickstart

TWINS = {"quickstart": quickstart, "desk": desk}


def get_config(twin="quickstart"):
  c = TWINS[twin].get_config()
  c.model.moe.num_experts = 0
  return c
