"""Configures a six-layer byte model with 16 experts in every other layer, on the embedded corpus.

  make desk       (= python -m moe_jax.train --config=configs/desk.py --workdir=runs/desk)

Training takes up to 45 minutes on two CPU cores. A token visits 2 of the 16 experts, the gates are
renormalised over these two (GShard, Mixtral), and no token is dropped.

Expected result: fewer bits per byte than the byte trigram and 4-gram models in every domain;
experiments/embedded_corpus/README.md has the table.
"""

from configs import base


def get_config():
  """Returns the config."""
  c = base.get_config()
  c.model.d_model = 192
  c.model.num_layers = 6
  c.model.num_heads = c.model.num_kv_heads = 3
  c.model.head_dim = 64
  c.model.d_ff = 512
  c.model.moe.num_experts = 16
  c.model.moe.d_ff = 256

  c.data.seq_len = 256
  # Prose is the hardest of the three sources but has few bytes, so the weights are not proportional
  # to the sizes.
  c.data.weights = (0.35, 0.45, 0.2)

  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 60
  c.optimizer.final_fraction = 0.02

  c.train.batch_size = 16
  c.train.steps = 1200
  c.train.log_every = 20
  c.train.eval_every = 200
  c.train.eval_batches = 8
  c.train.checkpoint_every = 200

  c.report.compare = "experiments/embedded_corpus/dense_desk.json"
  return c
