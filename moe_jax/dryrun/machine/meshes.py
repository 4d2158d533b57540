"""Meshes on which the papers' models fit machines of the papers' size: those of
docs/paper_scale.md.

Mixtral, DBRX and DeepSeekMoE fit with the shorter rows or the microbatches of that page's commands.
"""

from __future__ import annotations

import pathlib

from moe_jax.dryrun.machine.topology import Topology

MESHES = {  # (config's file and variant, machine) -> as after `--mesh=`
  ("gshard:600b", "v3:32x32"): "expert=2048",
  ("glam:64b_64e", "v4:8x8x16"): "fsdp=4,expert=64,tensor=4",
  ("st_moe:32b", "v4:4x8x8"): "fsdp=4,expert=64",
  ("switch:c", "v5p:8x8x8"): "expert=512",
  ("switch:xxl_128e", "v4:4x8x8"): "fsdp=2,expert=128",
  ("expert_choice:8b_64e", "v4:8x8x8"): "fsdp=8,expert=64",
  ("mixtral:8x22b", "v5p:4x8x8"): "fsdp=32,expert=8",
  ("mixtral:8x22b", "h100:32x8"): "fsdp=32,expert=8",
  ("dbrx:132b", "v5p:4x8x8"): "fsdp=16,expert=16",
  ("dbrx:132b", "h100:32x8"): "fsdp=16,expert=16",
  ("deepseek_moe:145b", "v5p:8x8x8"): "fsdp=4,expert=128",
}


def find(path: str, topology: Topology) -> str | None:
  """The mesh of configs/FAMILY.py:VARIANT on a machine, as after `--mesh=`; None: that pair is not
  in the table."""
  name, _, variant = path.partition(":")
  return MESHES.get((f"{pathlib.PurePath(name).stem}:{variant}", str(topology)))
