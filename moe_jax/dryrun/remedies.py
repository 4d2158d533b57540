"""What would make a step fit, by arithmetic: nothing is compiled for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from moe_jax import accounts
from moe_jax.dryrun import ideal
from moe_jax.dryrun.machine.chips import GIB


def remedies(config: Any, mesh: Any, vocab_size: int, expected: Mapping[str, float]) -> list[str]:
  """Changes of the config that lower the memory of a device, the most effective first, each with
  what it saves.

  Args:
    config: that did not fit.
    mesh: whose shape counts.
    vocab_size: ids of the data.
    expected: of `ideal.memory`.
  """
  sizes, found = dict(mesh.shape), []
  activations = expected["activations"]
  cheaper = changed(config, {"model.remat": "full"})
  per_row = accounts.activation_bytes(cheaper, vocab_size, sizes["tensor"])
  recomputed = (
    per_row * config.train.batch_size / config.train.accumulate_steps / ideal.batch_shards(sizes)
  )
  if recomputed < 0.9 * activations:
    found.append((activations - recomputed, "--config.model.remat=full"))
  rows = (
    config.train.batch_size // config.train.accumulate_steps // ideal.batch_shards(sizes)
  )  # of a device at a time
  parts = next((n for n in range(2, rows + 1) if rows % n == 0), 1)
  if parts > 1:
    found.append(
      (
        activations * (1 - 1 / parts),
        f"--config.train.accumulate_steps={parts * config.train.accumulate_steps}",
      )
    )
  if sizes["data"] > 1:  # copies of weights that data holds
    held = sum(size for kind, size in expected.items() if kind != "activations")
    moved = sizes | {"data": 1, "fsdp": sizes["fsdp"] * sizes["data"]}
    words = ",".join(f"{axis}={size}" for axis, size in moved.items() if size > 1)
    found.append((held * (1 - 1 / sizes["data"]), f"--mesh={words}"))
  found.sort(reverse=True)
  return [
    f"{words} (about {saved / GIB:.3g} GiB less)" for saved, words in found if saved > 0.01 * GIB
  ]


def changed(config: Any, values: Mapping[str, Any]) -> Any:
  """A copy of a config with other values, by dotted key."""
  copied = copy.deepcopy(config)
  with copied.unlocked():
    copied.update_from_flattened_dict(values)
  return copied
