"""Lists meshes on which the papers' models fit machines of the papers' size.

They are the meshes of docs/paper_scale.md. Mixtral, DBRX and DeepSeekMoE fit only with the shorter
rows or the microbatches of that page's commands.
"""

from __future__ import annotations

import pathlib

from moe_jax.dryrun.machine.topology import Topology

# (config file and variant, machine) -> the mesh, as it is written after `--mesh=`.
MESHES = {
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
  """Returns the mesh of a config on a machine, or None if the table does not have that pair.

  Args:
    path: The config, as configs/FAMILY.py:VARIANT.
    topology: The machine.

  Returns:
    The mesh as it is written after `--mesh=`, such as "fsdp=4,expert=64".
  """
  name, _, variant = path.partition(":")
  return MESHES.get((f"{pathlib.PurePath(name).stem}:{variant}", str(topology)))
