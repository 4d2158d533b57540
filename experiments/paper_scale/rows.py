"""The models and their machines, each on its mesh of `moe_jax/dryrun/machine/meshes.py`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from experiments.common.entry import parse
from moe_jax.dryrun.machine import meshes, topology
from moe_jax.errors import ConfigError

# Mixtral and DBRX have their batch of 4M tokens in shorter sequences. With one sequence of 32,768
# tokens on each device, the buffers in which dropless experts receive the worst case would need 245
# to 293 GiB.
SHORT = ("data.seq_len=4096", "train.batch_size=1024", "train.accumulate_steps=4")


@dataclasses.dataclass(frozen=True)
class Row:
  """One dry run.

  Attributes:
    config: "configs/FILE.py:VARIANT".
    topology: The machine, as after `--topology=`.
    changes: "KEY=VALUE" of the config, as after `--config.`.
    fast: Whether the compilers skip their most expensive optimisations.
  """

  config: str
  topology: str
  changes: tuple[str, ...] = ()
  fast: bool = True
  seeds = 0  # a dry run has no seeds

  @property
  def mesh(self) -> str:
    """The mesh that a dry run of this config and machine takes by itself, as after `--mesh=`."""
    return meshes.find(self.config, topology.parse(self.topology))

  def arguments(self) -> list[str]:
    """Returns the flags of `python -m moe_jax.dryrun` without --workdir."""
    return [
      f"--config={self.config}",
      f"--topology={self.topology}",
      f"--mesh={self.mesh}",
      *(["--fast"] if self.fast else []),
      *(f"--config.{change}" for change in self.changes),
    ]

  def command(self, directory: pathlib.Path) -> list[str]:
    """Returns the whole command, which leaves its report in no folder."""
    return ["python", "-m", "moe_jax.dryrun", *self.arguments()]

  def shortened(self, steps: int) -> Row:
    """Raises ConfigError: a dry run compiles one step."""
    raise ConfigError("steps", steps, "a dry run compiles a single step; leave the flag out")

  def changed(self, values: Mapping[str, str], seeds: int | None, router: str = "") -> Row:
    """Returns the row with other values of config keys.

    Raises:
      ConfigError: A number of seeds or a router is given.
    """
    if seeds is not None:
      raise ConfigError("seeds", seeds, "a dry run has no seeds; leave the flag out")
    if router:
      raise ConfigError(
        "router", router, "the rows of this study are the papers' own; leave it out"
      )
    return dataclasses.replace(
      self, changes=(*self.changes, *(f"{key}={value}" for key, value in values.items()))
    )

  def check(self) -> None:
    """Reads the row's config with all of its changes.

    Raises:
      ConfigError: A key does not exist or a value has the wrong type.
    """
    changes = [f"--config.{change}" for change in self.changes]
    parse(["", f"--config={self.config}", *changes], workdir=False)

  def by(self, dispatcher: str) -> Row:
    """Returns the row with another dispatcher."""
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
# Name of a model above, whose dispatcher is "all_to_all" -> its rows by dispatcher.
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


def rows(scale: str) -> dict[str, Row]:
  """Returns the rows, compiled with --fast or ("full") without."""
  return {name: dataclasses.replace(row, fast=scale != "full") for name, row in ROWS.items()}
