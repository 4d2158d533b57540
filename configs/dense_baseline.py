"""The dense twins: the same model, data and training with one FFN in place of the K experts that a
token visits.

  python -m moe_jax.train --config=configs/dense_baseline.py:quickstart
    --workdir=runs/dense_quickstart
  python -m moe_jax.train --config=configs/dense_baseline.py:desk --workdir=runs/dense_desk
  python -m moe_jax.train --config=configs/dense_baseline.py:glam --workdir=runs/dense_glam

The twin of a paper's family keeps its layers as they are, extra FFNs too, and has in each layer
with experts a single one that every token visits. A test compares the FLOPs of both; the README has
the tables.
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
  "gshard",
  "llama_moe",
  "lstm_moe",
  "mixtral",
  "olmoe",
  "qwen1_5_moe",
  "st_moe",
  "switch",
)


def get_config(twin="quickstart"):
  choose("config", twin, (*TWINS, *FAMILIES))
  if twin in FAMILIES:
    return one_expert(importlib.import_module(f"configs.{twin}").get_config("desk"))
  c = TWINS[twin].get_config()
  c.model.moe.num_experts = 0
  c.report.compare = f"experiments/embedded_corpus/{twin}.json"
  return c


def one_expert(c):
  """`c` with one expert, as wide as all that a token visits and with a gate of 1: random choice
  among one."""
  assembly.use_preset(c, "random")
  c.model.moe.num_experts = 1
  return c
