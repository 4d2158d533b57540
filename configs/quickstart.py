"""Configures a four-layer byte model with 8 experts in every other layer, on the embedded corpus.

  make run  (= python -m moe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart)

Training takes minutes on two CPU cores. Routing is that of Switch (Fedus et al. 2021): top-1, with
the raw probability as the gate and a balance loss of 0.01. No token is dropped.

Expected result: fewer bits per byte than the byte trigram model in every domain;
experiments/embedded_corpus/README.md has the table.
"""

from configs import base


def get_config():
  """Returns the config."""
  c = base.get_config()
  c.model.d_ff = 384
  c.model.moe.d_ff = 384
  c.model.moe.router.top_k.k = 1
  c.model.moe.router.top_k.gate_norm = "none"

  c.data.seq_len = 128

  c.train.batch_size = 16
  c.train.steps = 800
  c.train.log_every = 20
  c.train.eval_every = 200
  c.train.eval_batches = 8
  c.train.checkpoint_every = 200

  c.optimizer.learning_rate = 4e-3
  # A share of the steps, 50 of 800, so that a shorter run has a shorter warmup.
  c.optimizer.warmup_steps = c.train.get_ref("steps") // 16
  c.optimizer.final_fraction = 0.02

  c.report.compare = "experiments/embedded_corpus/dense_quickstart.json"
  return c
