"""Loads configs from Python files."""

from __future__ import annotations

import difflib
import importlib.machinery
import pathlib
import sys
import types
from typing import Any

from moe_jax.errors import ConfigError, shorten, shown
from moe_jax.options import Config

ROOT = pathlib.Path(__file__).resolve().parents[2]  # the clone, or where packages are installed
# The folder of the configs: that of the clone, or the copy inside an installed package.
CONFIGS = next(p for p in (ROOT / "configs", ROOT / "moe_jax" / "configs") if p.is_dir())
# The files in it that other configs are made from.
_SHARED = ("base", "shared")
LARGEST_CONFIG = 1_000_000  # bytes


def load_config(path: str) -> Config:
  """Returns what `get_config()`, or `get_config(VARIANT)`, of `FILE.py[:VARIANT]` returns.

  Args:
    path: The file, and perhaps a colon and a variant. The file is relative to the working directory
      or, if it is not there, to the clone; a config of the folder `configs/` needs no more than its
      name, such as "mixtral:desk". A workdir stands for the config of its run.

  Raises:
    ConfigError: There is no such file, or it does not define a valid config.
  """
  from moe_jax.assembly.sections import check_config

  if _is_workdir(folder := expand("config", path)):
    from moe_jax.run.load import stored_config

    return stored_config(folder)
  name, colon, variant = path.partition(":")
  file = _find_config(path, name)
  _make_importable(file.resolve().parent)
  try:
    module: Any = execute(file)
    config = module.get_config(*([variant] if colon else []))
    if hasattr(config, "lock"):
      config.lock()
      # Values may be computed from others, which fails only when they are asked for.
      config.to_dict()
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:
    # The Python file of a user may raise anything.
    raise ConfigError(
      "config",
      path,
      f"{type(error).__name__}: {shorten(str(error))}; the file must define "
      "get_config(), or get_config(variant) for a :variant, returning a ConfigDict (see "
      "configs/base.py)",
    ) from error
  try:
    check_config(config)
  except ConfigError as error:
    if error.field != "config":
      raise
    raise ConfigError(
      "config",
      path,
      f"its get_config() returns {shown(config)}, and must return a ConfigDict (see "
      "configs/base.py)",
    ) from error
  return config


def _is_workdir(folder: pathlib.Path) -> bool:
  """Returns whether a folder holds the config of a run."""
  try:
    return (folder / "config.json").is_file()
  except OSError:  # a name that is too long
    return False


def execute(file: pathlib.Path) -> types.ModuleType:
  """Returns the module of a Python file of a user, which may raise anything."""
  loader = importlib.machinery.SourceFileLoader("_of_user", str(file))
  module = types.ModuleType(loader.name)
  module.__file__ = str(file)
  loader.exec_module(module)
  return module


def config_names() -> list[str]:
  """Returns the names of all configs of the folder `configs/`, for `--config=NAME`."""
  return sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in _SHARED)


def _make_importable(folder: pathlib.Path) -> None:
  """Lets a config in this folder say `from configs import base`.

  `configs` is then the folder of the configs that come with the package and, if the config's own
  folder has that name, that folder, too.
  """
  if CONFIGS.parent == ROOT:
    places = sys.path
    wanted = [ROOT, folder.parent]
  else:
    # Beside the installed configs lie the modules of moe_jax, which must not be importable without
    # their package.
    module = sys.modules.setdefault("configs", types.ModuleType("configs"))
    places = module.__dict__.setdefault("__path__", [])
    wanted = [CONFIGS, *([folder] if folder.name == "configs" else [])]
  places += [str(place) for place in dict.fromkeys(wanted) if str(place) not in places]


def _find_config(path: str, name: str) -> pathlib.Path:
  """Returns the file that `--config=path` names; `name` is the part before the colon."""
  tried = [expand("config", name), ROOT / name, CONFIGS / name, CONFIGS / f"{name}.py"]
  try:
    file = next((p for p in tried if p.is_file()), None)
    size = file.stat().st_size if file else 0
  except OSError as error:  # a name that is too long
    raise ConfigError(
      "config", path, f"{error.strerror}; give the path of a config such as configs/quickstart.py"
    ) from error
  if file is None:
    if tried[0].is_dir():
      raise ConfigError(
        "config", path, "is a directory; give a file in it, such as configs/quickstart.py"
      )
    near = difflib.get_close_matches(pathlib.Path(name).stem, config_names(), 1)
    raise ConfigError(
      "config",
      path,
      "there is no such file"
      + (
        f"; did you mean {near[0]}?"
        if near
        else "; give the path of a config such as configs/quickstart.py"
      ),
    )
  if file.suffix != ".py" or size > LARGEST_CONFIG:
    raise ConfigError(
      "config",
      path,
      f"must be a Python file, *.py, of at most {LARGEST_CONFIG:,} bytes, such as "
      "configs/quickstart.py",
    )
  return file


def expand(flag: str, path: str) -> pathlib.Path:
  """Returns a path with ~ replaced by the home directory.

  Args:
    flag: The flag that the path was given with, for the message.
    path: The path.

  Raises:
    ConfigError: There is no such user.
  """
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise ConfigError(flag, path, f"{error}; give the path without ~") from error
