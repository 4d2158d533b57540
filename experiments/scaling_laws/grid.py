"""The grids of decoders over N, D, E and G for a desk and a pod, and runs as points of a fit.

The FFN of every block has width 4 d and no gate. It becomes E G experts of width 4 d / G, of which
a token visits G. Width and depth determine N, and the number of steps determines D. The learning
rate of each run decays until the run's own end.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from typing import Any

from experiments.common.entry import parse
from experiments.common.sweep import Row
from moe_jax import accounts, assembly

# "sizes" are the width and layers of the dense models, each trained for each number of "steps".
# "routed" are the sizes at which the number of experts varies, with the most steps. At these sizes,
# with each number of steps and with E = "fine", the granularity varies, too.
DESK = {
  "sizes": ((32, 2), (48, 3), (64, 4), (96, 4)),
  "steps": (100, 200, 400),
  "experts": (2, 4, 8),
  "routed": ((32, 2), (48, 3), (64, 4)),
  "granularity": (1, 2, 4),
  "fine": 8,
}
# As in Krajewski et al. 2024, d = 64 n_blocks and 16 to 130 billion tokens, and as in Clark et al.
# 2022, 2 to 512 experts.
PAPER = {
  "sizes": ((256, 4), (384, 6), (512, 8), (768, 12)),
  "steps": (61_000, 122_000, 244_000, 496_000),
  "experts": (2, 4, 8, 16, 32, 64, 128, 256, 512),
  "routed": ((256, 4), (384, 6), (512, 8), (768, 12)),
  "granularity": (1, 2, 4, 8, 16),
  "fine": 64,
}


def rows(scale: str) -> dict[str, Row]:
  """Returns the rows of a grid, "desk" or "paper", by name.

  They are dense models over N and D, routed models over N and E, and fine-grained models over N, D
  and G.
  """
  sizes = DESK if scale == "desk" else PAPER
  make = functools.partial(_row, scale)
  longest = max(sizes["steps"])
  pairs = [make(*size, steps, 1, 1) for size in sizes["sizes"] for steps in sizes["steps"]]
  pairs += [
    make(*size, longest, experts, 1) for size in sizes["routed"] for experts in sizes["experts"]
  ]
  pairs += [
    make(*size, steps, sizes["fine"], granularity)
    for size in sizes["routed"]
    for steps in sizes["steps"]
    for granularity in sizes["granularity"]
  ]
  return dict(pairs)


def _row(
  scale: str, width: int, layers: int, steps: int, experts: int, granularity: int
) -> tuple[str, Row]:
  head = 16 if scale == "desk" else 64
  keys: dict[str, Any] = {
    "model.d_model": width,
    "model.num_layers": layers,
    "model.num_heads": width // head,
    "model.num_kv_heads": width // head,
    "model.head_dim": head,
    "model.d_ff": 4 * width,
    "model.activation": "gelu",
    "model.moe.num_experts": experts * granularity if experts > 1 else 0,
  }
  if experts > 1:
    keys |= {
      "model.moe.first": 0,
      "model.moe.every": 1,
      "model.moe.d_ff": 4 * width // granularity,
      "model.moe.router.top_k.k": granularity,
    }
  keys["train.steps"] = steps
  name = f"d{width}_l{layers}_s{steps}_e{experts}_g{granularity}"
  if scale == "paper":
    return name, Row("configs/olmoe.py", keys | _PAPER)
  at_ends = {"train.eval_every": steps, "train.checkpoint_every": steps // 2}
  return name, Row("configs/quickstart.py", keys | _DESK | at_ends)


_DESK = {"optimizer.warmup_steps": 20, "train.eval_batches": 16, "report.compare": ""}
_PAPER = {
  "model.moe.router.top_k.gate_norm": "none",
  "data.seq_len": 1024,
  "train.batch_size": 256,
  "mesh.data": 1,
  "mesh.fsdp": -1,
}


def point(line: Mapping[str, Any]) -> dict[str, float]:
  """Returns a line of results as a point of a fit.

  N is counted in all three ways on the real model, and the loss is averaged over the sources.
  """
  return _sizes(*line["arguments"]) | {
    "d": line["tokens"],
    "loss": statistics.fmean(line["loss"].values()),
  }


@functools.cache
def _sizes(*arguments: str) -> dict[str, float]:
  """Returns the columns of a point that follow from the config."""
  config = parse(["", *arguments], workdir=False).config
  vocab_size = assembly.vocab_size(config)
  total, activated = accounts.parameter_counts(config, vocab_size)
  embeddings = accounts.parameters_by_kind(config, vocab_size)["embedding"]
  experts, width = config.model.moe.num_experts, config.model.moe.d_ff
  return {
    "n_total": total,
    "n_body": total - embeddings,
    "n_activated": activated - embeddings,
    "experts": experts * width / config.model.d_ff if experts else 1.0,
    "granularity": config.model.d_ff / width if experts else 1.0,
  }
