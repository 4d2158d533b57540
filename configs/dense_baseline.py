"""Configures the dense twins, in which one FFN replaces the K experts that a token visits.

  python -m moe_jax.train --config=configs/dense_baseline.py:quickstart
    --workdir=runs/dense_quickstart
  python -m moe_jax.train --config=configs/dense_baseline.py:desk --workdir=runs/dense_desk
  python -m moe_jax.train --config=configs/dense_baseline.py:glam --workdir=runs/dense_glam

Model, data and training are otherwise the same. The twin of a paper's family keeps its layers as
they are, including extra FFNs, and has a single expert, which every token visits, in each layer
with experts. A test compares the FLOPs of both; docs/results.md says where the tables are.
"""

import importlib

from configs import desk, quickstart
from moe_jax import assembly
from moe_jax.errors import choose

TWINS = {"quickstart": quickstart, "desk": desk}
FAMILIES = (
  "brainformer",
  "dbrx",
  "deepseek_moe",
  "deepseek_v2",
  "deepseek_v3",
  "expert_choice",
  "glam",
  "glm_4_5",
  "gpt_oss",
  "gshard",
  "kimi_k2",
  "lifelong_moe",
  "llama4",
  "llama_moe",
  "longcat_flash",
  "lstm_moe",
  "mixtral",
  "olmoe",
  "qwen1_5_moe",
  "qwen3_moe",
  "st_moe",
  "switch",
)


def get_config(twin="quickstart"):
  """Returns the dense twin of "quickstart", of "desk", or of the desk variant of a family."""
  choose("config", twin, (*TWINS, *FAMILIES))
  if twin in FAMILIES:
    return one_expert(importlib.import_module(f"configs.{twin}").get_config("desk"))
  c = TWINS[twin].get_config()
  c.model.moe.num_experts = 0
  c.report.compare = f"experiments/embedded_corpus/{twin}.json"
  return c


def one_expert(c):
  """Replaces the experts in `c` by a single one, and returns `c`.

  The expert is as wide as the experts that a token visits are together. The preset "random" chooses
  among this one expert, so its gate is always 1.
  """
  assembly.use_preset(c, "random")
  c.model.moe.num_experts = 1
  return c
