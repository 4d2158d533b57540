"""Loads configs from Python files."""

from __future__ import annotations

import difflib
import importlib.util
import pathlib
import sys

from moe_jax.errors import ConfigError, shorten, shown

ROOT = pathlib.Path(__file__).resolve().parents[2]  # The clone, where configs/ is.
LARGEST_CONFIG = 1_000_000  # bytes


def load_config(path: str):
  """The ConfigDict of `FILE.py[:VARIANT]`: `get_config()`, or `get_config(VARIANT)`.

  Args:
    path: relative to the working directory or, failing that, to the clone or its `configs/`.

  Raises:
    ConfigError: there is no such file, or it does not define a config.
  """
  from moe_jax.assembly.sections import check_config

  name, colon, variant = path.partition(":")
  file = _find_config(path, name)
  for place in (
    str(ROOT),
    str(file.resolve().parent.parent),
  ):  # so that it can say `from configs import base`
    if place not in sys.path:
      sys.path.append(place)
  try:
    spec = importlib.util.spec_from_file_location("_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([variant] if colon else []))
    if hasattr(config, "lock"):
      config.lock()
      config.to_dict()  # whose values may be computed from others
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:  # whatever a user's Python file may raise
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


def _find_config(path: str, name: str) -> pathlib.Path:
  """The file that `--config=path` names, whose part before a colon is `name`."""
  tried = [expand("config", name), ROOT / name, ROOT / "configs" / name]
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
    near = difflib.get_close_matches(
      pathlib.Path(name).stem, [p.stem for p in (ROOT / "configs").glob("*.py")], 1
    )
    raise ConfigError(
      "config",
      path,
      "there is no such file"
      + (
        f"; did you mean configs/{near[0]}.py?"
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
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise ConfigError(flag, path, f"{error}; give the path without ~") from error
