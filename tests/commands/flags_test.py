"""The one parser of flags."""

import pytest

from moe_jax.commands import Flag, take_flags
from moe_jax.commands.flags import number, switch
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit

FLAGS = (Flag("mesh"), Flag("fast", bare=""))


def test_both_ways_to_give_a_value():
  # Catches a value that is taken for an argument, and a switch that swallows the next argument.
  args = ["--mesh", "data=2", "--fast", "--config=x.py", "--config.seed=3", "--noconfig.a", "rest"]
  assert take_flags(args, FLAGS) == (
    {"mesh": "data=2", "fast": ""},
    ["--config=x.py", "--config.seed=3", "--noconfig.a", "rest"],
  )
  assert take_flags(["--mesh=a=b", "--fast=true"], FLAGS)[0] == {"mesh": "a=b", "fast": "true"}
  assert take_flags(["--mesh"], FLAGS)[0] == {"mesh": ""}


def test_unknown_flags():
  # Catches a misspelt flag that is passed on, or refused where flags of others are passed on.
  with pytest.raises(ConfigError, match="did you mean --mesh"):
    take_flags(["--mehs=1"], FLAGS)
  with pytest.raises(ConfigError, match="the flags are --mesh, --fast, --debug"):
    take_flags(["--config=x"], FLAGS, config=False)
  passed = take_flags(["--workdir=x", "--fast"], FLAGS, passes=True)
  assert passed == ({"fast": ""}, ["--workdir=x"])


def test_switch():
  # Catches --flag=false that is on.
  values = (None, "", "true", "false")
  assert [switch("fast", value) for value in values] == [False, True, True, False]
  with pytest.raises(ConfigError, match="fast='1'"):
    switch("fast", "1")


def test_number():
  # Catches a number that is read as infinite, which no option means.
  assert number("temperature", "0.5") == 0.5
  for value in ("", "hot", "nan", "inf"):
    with pytest.raises(ConfigError, match="must be a number"):
      number("temperature", value)
