"""Each config as it resolves, kept in `config_snapshots/`: a changed default shows its blast radius in the diff.

After a change that is meant: `python tests/configs_test.py`, look at the diff, and put what moved under Numerics in
CHANGELOG.
"""

import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SNAPSHOTS = ROOT / "tests" / "config_snapshots"
CONFIGS = ("base.py", "quickstart.py", "desk.py", "dense_baseline.py:quickstart", "dense_baseline.py:desk")

pytestmark = pytest.mark.unit


def resolved(name: str) -> str:
  from moe_jax.train import load_config  # not at the top: jaxtyping's import hook comes first
  return json.dumps(load_config(f"configs/{name}").to_dict(), indent=1) + "\n"


def snapshot(name: str) -> pathlib.Path:
  return SNAPSHOTS / (name.replace(".py", "").replace(":", "_") + ".json")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_resolves_as_before(name):
  # Catches: a default changed for one experiment that silently changes the others.
  assert resolved(name) == snapshot(name).read_text()


def test_every_config_has_a_snapshot():
  # Catches: a new config file that nobody watches.
  assert {p.name for p in (ROOT / "configs").glob("*.py")} == {name.partition(":")[0] for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid(name):
  # Catches: a config that is only found to be wrong by whoever runs it.
  from moe_jax import build
  from moe_jax.train import load_config
  config = load_config(f"configs/{name}")
  build.validate(config, 1)
  total, activated = build.parameter_counts(config, 264)
  assert 0 < activated <= total


if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))
  for each in CONFIGS:
    snapshot(each).write_text(resolved(each))
