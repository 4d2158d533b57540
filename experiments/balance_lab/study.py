"""The rows of the trained part: one small model whose load each method balances.

The model is `experiments/compare_routers/backbone.py:desk` with 32 experts of a quarter of its
FFN's width, of which each token takes 4 by the sigmoid of its logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common.sweep import Row
from experiments.compare_routers import backbone

SEEDS, STEPS, EVERY = 3, 300, 5
NONE = "none"
# The rate of each method that has one: the best of four in the simulation (drift.jsonl), which was
# run before any row of this table.
TUNED: Mapping[str, float] = {
  "sign": 0.003,
  "centred_sign": 0.003,
  "smebu": 0.03,
  "proportional": 0.1,
  "pid": 0.03,
}
_ROUTER = "model.moe.router.sigmoid_bias"
_COMMON = {
  "model.moe": "deepseek_v3",
  "model.moe.num_experts": 32,
  "model.moe.num_shared_experts": 0,
  f"{_ROUTER}.k": 4,
  f"{_ROUTER}.groups": 1,
  f"{_ROUTER}.kept_groups": 1,
  "model.moe.routed_scale": 1.0,
  "model.moe.balance_loss": 0.0,
  "model.moe.balancing.rule": "none",
  "model.moe.balancing.rate": None,
  "train.steps": STEPS,
  "train.log_every": EVERY,
  "train.eval_every": STEPS,
}
_LOSS = {"model.moe.balance_loss": 0.01}
# A routing group is a row of the batch, a quarter of the batch, or the batch.
_ROW, _QUARTER = {"model.moe.group_rows": 1}, {"model.moe.group_rows": 4}


def _rule(name: str, rate: float | None) -> dict[str, Any]:
  return {"model.moe.balancing.rule": name, "model.moe.balancing.rate": rate}


CHANGES: Mapping[str, Mapping[str, Any]] = {
  NONE: {},
  "sign_0.001": _rule("sign", 0.001),
  **{name: _rule(name, rate) for name, rate in TUNED.items()},
  "quantile": _rule("quantile", None),
  "quantile_histogram": _rule("quantile_histogram", None),
  "bip": _rule("bip", None),
  "loss_sequence": _LOSS | _ROW,
  "loss_microbatch": _LOSS | _QUARTER,
  "loss_global": _LOSS,
  "sinkhorn": {
    "model.moe.router.name": "sinkhorn",
    "model.moe.router.sinkhorn.k": 4,
    "model.moe.allow_noncausal_routing": True,
  },
}


def rows() -> dict[str, Row]:
  """Returns the rows by name."""
  width = backbone.get_config("desk").model.d_ff
  config = "experiments/compare_routers/backbone.py:desk"
  return {
    name: Row(config, _COMMON | {"model.moe.d_ff": width // 4} | changes, SEEDS, apart=True)
    for name, changes in CHANGES.items()
  }
