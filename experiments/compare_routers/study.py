"""The rows of the study: each router's preset in one backbone, with three seeds each.

All rows of a group have the same number of experts of the same shape, so that two of them differ
only in how tokens are routed. Groups differ in granularity, too. In every row, the experts that a
token visits are together as wide as the dense twin's FFN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.common.sweep import Row
from experiments.compare_routers import backbone

SEEDS = 3
DENSE = "dense"


class Group(NamedTuple):
  """Rows whose tokens visit the same number of experts of the same shape.

  Attributes:
    title: The experts that a token visits, in words.
    experts: E, the number of routed experts.
    visited: The number of experts that a token visits: K routed ones and the shared ones.
    rows: Name -> the config keys that the row changes. The first key of a row is its preset.
  """

  title: str
  experts: int
  visited: int
  rows: Mapping[str, Mapping[str, Any]]


_AHEAD = {"model.moe.allow_noncausal_routing": True}
# DeepSeek's rows: a quarter of the experts that a token visits is shared, as in DeepSeekMoE's 2 of
# 8, and half of the groups are kept, as in DeepSeek-V3. There are twice as many experts as in the
# other groups, so that they have as many parameters as those of "2 of 16".
_FINE = {"model.moe.num_experts": 2 * backbone.EXPERTS, "model.moe.num_shared_experts": 1}

GROUPS = (
  Group(
    "1 of 16 experts",
    16,
    1,
    {
      "random": {"model.moe": "random"},
      "hash": {"model.moe": "hash"},
      "switch": {"model.moe": "switch"},
      "base_layers": {"model.moe": "base_layers"} | _AHEAD,
      "s_base": {"model.moe": "s_base"} | _AHEAD,
    },
  ),
  Group(
    "2 of 16, half as wide",
    16,
    2,
    {
      "gshard": {"model.moe": "gshard"},
      "st_moe": {"model.moe": "st_moe"},
      "mixtral": {"model.moe": "mixtral"},
      "noisy_top_k": {"model.moe": "noisy_top_k", "model.moe.router.noisy_top_k.k": 2},
      "expert_choice": {"model.moe": "expert_choice"} | _AHEAD,
    },
  ),
  Group(
    "3 of 32 and a shared one, a quarter as wide",
    32,
    4,
    {
      "deepseek_moe": {"model.moe": "deepseek_moe", "model.moe.router.top_k.k": 3} | _FINE,
      "deepseek_v3": {
        "model.moe": "deepseek_v3",
        "model.moe.router.sigmoid_bias.k": 3,
        "model.moe.router.sigmoid_bias.groups": 4,
        "model.moe.router.sigmoid_bias.kept_groups": 2,
      }
      | _FINE,
    },
  ),
)

# Rows in which no logit decides anything, so that entropy and largest logit mean nothing.
UNREAD = (DENSE, "random", "hash")
# Rows in which a token's routing depends on later tokens, each with its mark.
SEES = {"expert_choice": "†", "base_layers": "‡", "s_base": "‡", "gshard": "§", "st_moe": "§"}
MARKS = {
  "†": "sees later tokens, at evaluation too: its bits are not those of a causal model and do not "
  "compare",
  "‡": "sees later tokens in training only",
  "§": "where slots run out, later tokens' first choices displace earlier ones' second, at "
  "evaluation too",
}


def rows(scale: str) -> dict[str, Row]:
  """Returns the rows of a scale, "desk" or "gpu", by name."""
  config, width = (
    f"experiments/compare_routers/backbone.py:{scale}",
    backbone.get_config(scale).model.d_ff,
  )
  # The seeds take turns (`apart`), because the loops of the grouped dispatcher are as long as an
  # expert's load. Under vmap they would be as long as the largest load of any seed.
  made = {DENSE: Row(config, {"model.moe.num_experts": 0}, SEEDS, apart=True)}
  for group in GROUPS:
    for name, changes in group.rows.items():
      made[name] = Row(
        config, changes | {"model.moe.d_ff": width // group.visited}, SEEDS, apart=True
      )
  return made


def group_of(name: str) -> Group | None:
  """Returns the group of a row, or None for the dense twin."""
  return next((group for group in GROUPS if name in group.rows), None)
