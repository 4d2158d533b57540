"""Tests that the checklist in CONTRIBUTING for a new router is complete.

A new router needs a file, one line in `ROUTERS`, an oracle, a test, a preset and one line in the
conformance table. The test makes these changes, and no others, in a copy of the repository.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.smoke
ROOT = pathlib.Path(__file__).resolve().parents[2]

ROUTER = '''"""Each token goes to the expert of its largest logit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.options import check
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import token_choice


def toy(logits: Float[Array, "S E"], context: RoutingContext, *, scale: float = 1.0) -> RoutingPlan:
  """The gate is a sigmoid of the largest logit.

  Paper: none (arXiv 0000.00000).

      g = sigmoid(scale * max_e x_e)
  """
  check("toy", "scale", scale, scale > 0, "> 0")
  expert = jnp.argmax(logits, axis=-1)[:, None]
  largest = jnp.take_along_axis(logits.astype(jnp.float32), expert, axis=-1)
  return token_choice(expert, jax.nn.sigmoid(scale * largest), context, logits.shape[-1])


# A token's choice depends on that token alone.
ROUTER = Router(toy, "no")
'''
ORACLE = '''"""The toy router, as loops."""

import math

from oracles.draws import valid_tokens


def toy(logits, context, *, scale=1.0):
  plan = []
  for t in valid_tokens(logits, context):
    expert = max(range(len(logits[t])), key=lambda e: logits[t][e])
    plan.append((t, expert, 1 / (1 + math.exp(-scale * float(logits[t][expert])))))
  return plan
'''
TEST = '''"""The toy router, by hand."""

import jax.numpy as jnp

from moe_jax.routing import RoutingContext
from moe_jax.routing.toy import toy


def test_the_largest_logit():
  assert toy(jnp.array([[0.0, 1.0]]), RoutingContext()).expert.tolist() == [1]
'''


def add(file: pathlib.Path, before: str, line: str) -> None:
  """Inserts a line before the only occurrence of `before`."""
  text = file.read_text()
  assert text.count(before) == 1
  file.write_text(text.replace(before, line + before))


@pytest.mark.every_variant
def test_a_router_is_added_by_the_checklist(tmp_path):
  # Catches another table that a new router must be added to, and a part of the test suite that does
  # not include it.
  for name in ("moe_jax", "tests", "configs", "experiments", "docs"):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "setup.py"):
    shutil.copy(ROOT / name, tmp_path / name)
  (tmp_path / "moe_jax/routing/toy.py").write_text(ROUTER)
  add(tmp_path / "moe_jax/routing/__init__.py", '  "top_k",\n', '  "toy",\n')
  (tmp_path / "tests/oracles/toy.py").write_text(ORACLE)
  (tmp_path / "tests/routing/toy_test.py").write_text(TEST)
  add(
    tmp_path / "moe_jax/assembly/presets.py",
    '  "gshard": ("gshard"',
    '  "toy": ("toy", {"scale": 2.0}, {}),\n',
  )
  add(
    tmp_path / "tests/dispatch/conformance_test.py",
    '  ("base", {"epsilon": 0.0625})',
    '  ("toy", {"scale": 0.5}),\n',
  )
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "pytest",
      "-q",
      "-p",
      "no:xdist",
      "-m",
      "",
      "-k",
      "toy or in_the_table or mirror",
      "tests/dispatch/conformance_test.py",
      "tests/routing/toy_test.py",
      "tests/assembly/presets_test.py",
      "tests/layering_test.py",
    ],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert not done.returncode, done.stdout[-3000:]
  assert "passed" in done.stdout and "failed" not in done.stdout
