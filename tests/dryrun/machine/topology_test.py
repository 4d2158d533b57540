"""Tests how names of machines are parsed, and what is proposed for names that are refused."""

import importlib.util

import pytest

from moe_jax.dryrun.machine import topology
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "name, slices, devices",
  [
    ("v4:8x8x16", 1, 1024),  # one device per chip
    ("v3:32x32", 1, 2048),
    ("tpu7x:4x4x8", 1, 256),  # two devices per chip
    ("v5p:16x20x28", 1, 8960),
    ("V5E:2x4", 2, 16),
    ("v5litepod:4x4", 1, 16),
    ("h100:128x8", 1, 1024),
  ],
)
def test_devices_of_a_machine(name, slices, devices):
  # Catches cores that are counted instead of chips on v4, slices that do not count, and names in
  # upper case that are refused.
  assert topology.parse(name, slices).num_devices == devices


@pytest.mark.parametrize(
  "name, words",
  [
    (None, "--topology=v4:8x8x16"),
    ("v9:4x4", "known: v2, v3"),
    ("v4-2048", "two a chip: did you mean v4:8x8x16?"),  # its number counts cores
    ("v5e-256", "counts chips: did you mean v5e:16x16?"),
    ("v5litepod-16", "v5e:4x4?"),
    ("v5p-512", "v5p:4x8x8?"),
    ("v3-2048", "v3:32x32?"),
    ("h100-1024", "h100:128x8"),
    ("h100:1024", "h100:128x8"),
    ("v4:8x8", "3 dimensions"),
    ("v4:8x8x16\nv5e:2x4", "must be a kind and a shape"),
    ("v5e:64x64", "nearest: v5e:16x16"),
    ("v4:6x8x8", "multiples of 4"),
    ("v5e:2x16", "at most twice"),
    ("h100:4x16", "at most 8"),
    ("v4:axb", "a kind and a shape"),
  ],
)
def test_other_names_are_refused_with_the_right_spelling(name, words):
  # Catches libtpu's own error, which names no remedy, and the lack of an error: libtpu accepts
  # v5e:64x64.
  with pytest.raises(ConfigError, match="^topology=") as error:
    topology.parse(name)
  assert words in str(error.value)


def test_slices_are_at_least_one():
  # Catches a machine without devices.
  with pytest.raises(ConfigError, match="slices=0"):
    topology.parse("v4:4x4x4", 0)


@pytest.mark.parametrize(
  "name, package, words",
  [
    ("v4:4x4x4", "libtpu", "pip install -e '.[dryrun]'"),
    ("h100:1x8", "jax_cuda12_plugin", "jax-cuda12-pjrt"),
  ],
)
def test_a_missing_compiler_is_named_with_its_package(monkeypatch, name, package, words):
  # Catches an ImportError from within JAX, minutes after the command began.
  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda n, *rest: None if n == package else real(n, *rest)
  )
  with pytest.raises(ConfigError, match="not installed") as error:
    topology.make_devices(topology.parse(name))
  assert words in str(error.value)


def test_what_the_compiler_is_asked_for():
  # Catches two devices per chip on v4, which is not how it is used in practice, and slices that are
  # not passed on.
  def ask(name, slices=1):
    return topology._request(topology.parse(name, slices))

  assert ask("v4:4x4x8") == ("v4:4x4x8", {"chip_config_name": "megacore"})
  assert ask("v5e:2x4") == ("v5e:2x4", {"chips_per_host_bounds": [2, 4, 1]})
  assert ask("v6e:4x4", 2) == ("v6e:4x4", {"num_slices": 2})
  assert ask("a100:16x8")[1]["topology"] == "1x16x8"
