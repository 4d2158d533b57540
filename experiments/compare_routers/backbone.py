"""The models that the routers are put into, which are the same in every row of the study.

  python -m moe_jax.train --config=experiments/compare_routers/backbone.py:desk
    --config.model.moe=switch --workdir=DIR

Every other layer has experts. The dense twin is the same config with model.moe.num_experts=0: its
one FFN is as wide as the experts that a token visits are together.
"""

from configs import base, quickstart
from moe_jax.errors import choose

EXPERTS = 16


def desk():
  """Returns configs/quickstart.py at half its width: four layers of width 64.

  It is trained for 400 steps of 2048 bytes.
  """
  c = quickstart.get_config()
  c.model.update({"d_model": 64, "d_ff": 192, "head_dim": 16})
  c.train.update(
    {"steps": 400, "log_every": 20, "eval_every": 50, "eval_batches": 12, "checkpoint_every": 100}
  )
  c.report.compare = ""
  return c


def gpu():
  """Returns a model of about 100M activated parameters for one GPU.

  It is trained on 2.6 billion tokens, 20 for each parameter (Hoffmann et al. 2022).
  """
  c = base.get_config()
  c.model.update(
    {
      "d_model": 768,
      "num_layers": 12,
      "num_heads": 12,
      "num_kv_heads": 12,
      "head_dim": 64,
      "d_ff": 2048,
      "dtype": "bfloat16",
      "remat": "full",
    }
  )
  c.model.moe.router.top_k.update({"k": 1, "gate_norm": "none"})
  c.data.update(
    {
      "sources": ("tfds:c4/en:3.0.1",),
      "validation_split": "validation",
      "pipeline": "stream",
      "tokenizer": "hf:tokenizer.json",
      "seq_len": 1024,
    }
  )
  c.optimizer.update({"learning_rate": 6e-4, "warmup_steps": 500})
  c.train.update(
    {
      "batch_size": 256,
      "accumulate_steps": 16,
      "steps": 10_000,
      "log_every": 50,
      "eval_every": 500,
      "eval_batches": 64,
      "checkpoint_every": 500,
    }
  )
  return c


def get_config(scale="desk"):
  """Returns the config of a scale, "desk" or "gpu"."""
  c = choose("config", scale, {"desk": desk, "gpu": gpu})()
  c.model.moe.num_experts, c.model.moe.d_ff = EXPERTS, c.model.d_ff
  # All tokens of a microbatch are routed together.
  c.model.moe.group_rows = c.train.batch_size // c.train.accumulate_steps
  return c
