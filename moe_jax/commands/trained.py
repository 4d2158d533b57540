"""What commands that use a trained model share: their flags, and how they load it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from moe_jax.commands.config_file import expand
from moe_jax.commands.flags import Flag
from moe_jax.errors import ConfigError, whole

# The flags that say which model, and on which devices.
TRAINED = tuple(map(Flag, ("workdir", "step", "mesh", "router")))


def mesh_sizes(text: str | None) -> dict[str, int] | None:
  """Returns the size of each axis that --mesh=AXIS=N,... names, or None without the flag.

  Raises:
    ConfigError: The text does not have that form.
  """
  if text is None:
    return None
  from moe_jax import sharding

  sizes = {}
  for part in text.split(","):
    axis, equals, size = part.partition("=")
    if not equals or axis not in sharding.AXES or not size.isdecimal() or len(size) > 9:
      raise ConfigError(
        "mesh",
        text,
        f"must be AXIS=N,... with the axes {', '.join(sharding.AXES)}, as in data=1,tensor=4",
      )
    sizes[axis] = int(size)
  return sizes


def load(flags: Mapping[str, str]) -> Any:
  """Returns the `LoadedRun` that the flags of `TRAINED` name; the mesh is not used.

  Raises:
    ConfigError: There is no such run, checkpoint or router.
  """
  if not flags.get("workdir"):
    raise ConfigError(
      "workdir", flags.get("workdir"), "is missing; name the --workdir of a training run"
    )
  step = whole("step", flags["step"], low=0, high=10**12) if "step" in flags else None
  if "router" in flags:
    from moe_jax.assembly.sections import register_router
    from moe_jax.commands.router_file import load_router

    register_router(*load_router(flags["router"]))
  from moe_jax.data.cache import cache_dir
  from moe_jax.run import compiled
  from moe_jax.run.load import load_run

  run = load_run(expand("workdir", flags["workdir"]), step)
  if warning := compiled.use_cache(cache_dir(run.config.data.cache_dir)):
    print(f"warning: {warning}", file=sys.stderr)
  return run
