"""Which models on which machines, each on its mesh of `moe_jax/dryrun/machine/meshes.py`."""

from __future__ import annotations

import dataclasses

from moe_jax.dryrun.machine import meshes, topology

# Mixtral's and DBRX's batch of 4M tokens in shorter rows: with one of 32,768 tokens a device, the
# buffers in which dropless experts receive the worst case need 245 to 293 GiB.
SHORT = ("data.seq_len=4096", "train.batch_size=1024", "train.accumulate_steps=4")


@dataclasses.dataclass(frozen=True)
class Row:
  """One dry run.

  Attributes:
    config: "configs/FILE.py:VARIANT".
    topology: as after `--topology=`.
    changes: "KEY=VALUE" as after `--config.`.
  """

  config: str
  topology: str
  changes: tuple[str, ...] = ()

  @property
  def mesh(self) -> str:
    """As after `--mesh=`: what a dry run of this config and machine takes by itself."""
    return meshes.find(self.config, topology.parse(self.topology))

  def arguments(self, fast: bool = True) -> list[str]:
    """Of `python -m moe_jax.dryrun`."""
    return [
      f"--config={self.config}",
      f"--topology={self.topology}",
      f"--mesh={self.mesh}",
      *(["--fast"] if fast else []),
      *(f"--config.{change}" for change in self.changes),
    ]

  def by(self, dispatcher: str) -> Row:
    """The same with another dispatcher."""
    return dataclasses.replace(
      self, changes=(*self.changes, f"model.moe.dispatcher.name={dispatcher}")
    )


MODELS = {
  "gshard_600b": Row("configs/gshard.py:600b", "v3:32x32"),
  "glam_64b_64e": Row("configs/glam.py:64b_64e", "v4:8x8x16"),
  "st_moe_32b": Row("configs/st_moe.py:32b", "v4:4x8x8"),
  "switch_c": Row("configs/switch.py:c", "v5p:8x8x8"),
  "switch_xxl": Row("configs/switch.py:xxl_128e", "v4:4x8x8"),
  "expert_choice_8b_64e": Row("configs/expert_choice.py:8b_64e", "v4:8x8x8"),
  "mixtral_8x22b": Row("configs/mixtral.py:8x22b", "v5p:4x8x8", SHORT),
  "mixtral_8x22b_h100": Row("configs/mixtral.py:8x22b", "h100:32x8", SHORT),
  "dbrx": Row("configs/dbrx.py:132b", "v5p:4x8x8", SHORT),
  "dbrx_h100": Row("configs/dbrx.py:132b", "h100:32x8", SHORT),
  "deepseek_moe_145b": Row(
    "configs/deepseek_moe.py:145b", "v5p:8x8x8", ("train.accumulate_steps=9",)
  ),
}
# Name of a model above, which has "all_to_all" -> its rows by dispatcher.
COMPARED = {
  name: {
    dispatcher: name if dispatcher == "all_to_all" else f"{name}_{dispatcher}"
    for dispatcher in ("einsum", "all_to_all", "ragged_all_to_all")
  }
  for name in ("glam_64b_64e", "expert_choice_8b_64e")
}
ROWS = MODELS | {
  row: MODELS[name].by(dispatcher)
  for name, rows in COMPARED.items()
  for dispatcher, row in rows.items()
  if row not in MODELS
}
