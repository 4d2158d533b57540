"""An option of `model.moe` is added in two source files: its declaration and its use."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.smoke
ROOT = pathlib.Path(__file__).resolve().parents[2]

DECLARATION = """  gate_power: Annotated[float, POSITIVE] = option(
    1.0, "The exponent of all gates.", neutral=1.0
  )
"""
# Reads the option on the command line, checks it, builds the model and runs it; then a wrong value.
PROGRAM = """
import jax, jax.numpy as jnp
from moe_jax import assembly, sharding
from moe_jax.assembly.sections import NEUTRAL
from moe_jax.commands import parse
from moe_jax.errors import ConfigError

def run(*flags):
  flags = ["", "--config=quickstart.py", "--config.model.num_layers=2", *flags]
  config = parse(flags, workdir=False).config
  assembly.validate(config, 1)
  model = assembly.model(config, 264, sharding.make_mesh({"data": 1}))
  ids = jnp.ones((1, 128), jnp.int32)
  return model.apply(model.init(jax.random.key(0), ids, ids, ids, train=False), ids, ids, ids,
                     train=False)[0]

assert float(jnp.abs(run() - run("--config.model.moe.gate_power=2")).max()) > 0
assert NEUTRAL["gate_power"] == 1.0
try:
  run("--config.model.moe.gate_power=-1.0")
except ConfigError as error:
  print(error)
"""


def replace(file: pathlib.Path, old: str, new: str) -> None:
  """Replaces the only occurrence of `old`."""
  text = file.read_text()
  assert text.count(old) == 1
  file.write_text(text.replace(old, new))


@pytest.mark.every_variant
def test_an_option_is_declared_once_and_read_once(tmp_path):
  # Catches another list of keys, bounds, neutral values or snapshots that a new option needs.
  for name in ("moe_jax", "tests", "configs", "experiments", "docs"):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "setup.py"):
    shutil.copy(ROOT / name, tmp_path / name)
  declared = "  routed_scale: Annotated[float, POSITIVE] = option("
  replace(tmp_path / "moe_jax/layers/gate.py", declared, DECLARATION + declared)
  used = "scaled = scale_gates(plan, self.gate.routed_scale, scale)"
  power = "scaled = scaled.replace(gate=scaled.gate**self.gate.gate_power)"
  replace(tmp_path / "moe_jax/layers/moe.py", used, f"{used}\n    {power}")
  environment = os.environ | {"PYTHONPATH": str(tmp_path)}

  def python(*args):
    done = subprocess.run(
      [sys.executable, *args],
      cwd=tmp_path,
      env=environment,
      capture_output=True,
      text=True,
      timeout=500,
    )
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout

  words = "model.moe.gate_power=-1.0: must be a number, above 0"
  assert python("-c", PROGRAM).startswith(words)
  assert "gate_power" in python("-m", "moe_jax.train", "--help=model.moe")
  python("-m", "moe_jax.commands.help", "--write=docs/options.md")
  python(
    *("-m", "pytest", "-q", "-p", "no:xdist"),
    *("tests/configs_test.py", "tests/assembly/sections_test.py", "tests/assembly/presets_test.py"),
    *("tests/commands/help_test.py", "-k", "not variant and not desk"),
  )
