"""The rows: each router's preset put into one backbone, three seeds trained together.

Rows of a group have experts of one shape and as many of them, so that nothing differs between two
of them but how tokens are routed. Between groups granularity differs, too. A token's experts
together are as wide as the dense twin's FFN in every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.common.sweep import Row
from experiments.compare_routers import backbone

SEEDS = 3
DENSE = "dense"


class Group(NamedTuple):
  """Rows whose tokens visit as many experts of one shape.

  Attributes:
    title: what a token visits.
    experts: E, routed.
    visited: K, plus the shared ones.
    rows: name -> what the row changes, after `--config.`; the first of them is a preset's name.
  """

  title: str
  experts: int
  visited: int
  rows: Mapping[str, Mapping[str, Any]]


_AHEAD = {"model.moe.allow_noncausal_routing": True}
# DeepSeek's: a quarter of what a token visits is shared, as in DeepSeekMoE's 2 of 8; half of the
# groups are kept, as in DeepSeek-V3. Twice as many experts as elsewhere, so that they hold as much
# as those of "2 of 16".
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

UNREAD = (
  DENSE,
  "random",
  "hash",
)  # no logit decides anything: their entropy and largest logit mean nothing
# Who looks at later tokens, and when.
SEES = {"expert_choice": "†", "base_layers": "‡", "s_base": "‡", "gshard": "§", "st_moe": "§"}
MARKS = {
  "†": "sees later tokens, at evaluation too: its bits are not those of a causal model and do not "
  "compare",
  "‡": "sees later tokens in training only",
  "§": "where slots run out, later tokens' first choices displace earlier ones' second, at "
  "evaluation too",
}


def rows(scale: str) -> dict[str, Row]:
  """name -> row, of "desk" or "gpu"."""
  config, width = (
    f"experiments/compare_routers/backbone.py:{scale}",
    backbone.get_config(scale).model.d_ff,
  )
  # Apart: loops of the grouped dispatcher are as long as an expert's load, and vmap would make them
  # as long as any's.
  found = {DENSE: Row(config, {"model.moe.num_experts": 0}, SEEDS, apart=True)}
  for group in GROUPS:
    for name, changes in group.rows.items():
      found[name] = Row(
        config, changes | {"model.moe.d_ff": width // group.visited}, SEEDS, apart=True
      )
  return found


def group_of(name: str) -> Group | None:
  """The row's group; None: of the dense twin."""
  return next((group for group in GROUPS if name in group.rows), None)
