"""Suggests changes that would make a step fit, by arithmetic alone and without compiling."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from moe_jax import accounts
from moe_jax.dryrun import ideal
from moe_jax.dryrun.machine.chips import GIB


def remedies(config: Any, mesh: Any, vocab_size: int, expected: Mapping[str, float]) -> list[str]:
  """Returns flags that lower the memory of a device, each with what it saves.

  Args:
    config: The config that does not fit.
    mesh: The mesh, of which only the shape matters.
    vocab_size: The number of ids in the data.
    expected: The expected memory, as `ideal.memory` returns it.

  Returns:
    Texts such as "--config.model.remat=full (about 50 GiB less)", the most effective first. Changes
    that save less than 0.01 GiB are left out.
  """
  sizes, savings = dict(mesh.shape), []
  activations = expected["activations"]
  cheaper = changed(config, {"model.remat": "full"})
  per_row = accounts.activation_bytes(cheaper, vocab_size, sizes["tensor"])
  recomputed = (
    per_row * config.train.batch_size / config.train.accumulate_steps / ideal.batch_shards(sizes)
  )
  if recomputed < 0.9 * activations:
    savings.append((activations - recomputed, "--config.model.remat=full"))
  # The rows that a device holds at a time. The smallest factor into which they can be split gives
  # the fewest microbatches.
  rows = config.train.batch_size // config.train.accumulate_steps // ideal.batch_shards(sizes)
  parts = next((n for n in range(2, rows + 1) if rows % n == 0), 1)
  if parts > 1:
    savings.append(
      (
        activations * (1 - 1 / parts),
        f"--config.train.accumulate_steps={parts * config.train.accumulate_steps}",
      )
    )
  # Every position along data holds a copy of the weights, which fsdp would split instead.
  if sizes["data"] > 1:
    held = sum(size for kind, size in expected.items() if kind != "activations")
    moved = sizes | {"data": 1, "fsdp": sizes["fsdp"] * sizes["data"]}
    words = ",".join(f"{axis}={size}" for axis, size in moved.items() if size > 1)
    savings.append((held * (1 - 1 / sizes["data"]), f"--mesh={words}"))
  savings.sort(reverse=True)
  return [
    f"{words} (about {saved / GIB:.3g} GiB less)" for saved, words in savings if saved > 0.01 * GIB
  ]


def changed(config: Any, values: Mapping[str, Any]) -> Any:
  """Returns a copy of a config with some values changed.

  Args:
    config: The config, which stays as it is.
    values: Dotted key to new value.
  """
  copied = copy.deepcopy(config)
  with copied.unlocked():
    copied.update_from_flattened_dict(values)
  return copied
