"""Overrides, presets and None on the command line."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import commands, train
from moe_jax.commands import command_line
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def arguments(tmp_path, *extra):
  flags = tiny.flags(tmp_path)
  return ["train", "--config=configs/base.py", f"--workdir={tmp_path / 'run'}", *flags, *extra]


def test_routing_presets_on_the_command_line(tmp_path, capfd):
  # Catches a preset that undoes what else the command line says, or comes after it, and an unknown
  # one with a traceback.
  def parse(*extra):
    return commands.parse(arguments(tmp_path) + list(extra)).config.model.moe

  e = parse(
    "--config.model.moe=st_moe",
    "--config.model.moe.z_loss=0.5",
    "--config.model.moe.router.st_moe.k=3",
  )
  assert (
    e.router["name"] == "st_moe"
    and e.router.st_moe.k == 3
    and e.z_loss == 0.5
    and e.capacity_factor == 1.25
  )
  assert parse("--config.model.moe.z_loss=0.5", "--config.model.moe=st_moe").z_loss == 0.5
  assert train.main([*arguments(tmp_path), "--config.model.moe=gshrad"]) == 2
  assert "did you mean 'gshard'" in capfd.readouterr().err
  assert train.main([*arguments(tmp_path), "--config.model.moe", "gshard"]) == 2  # without the =
  assert "model.moe='': known: " in capfd.readouterr().err


def test_a_preset_for_a_dense_model_that_gets_experts(tmp_path):
  # Catches a preset that is refused although the same command gives the model experts, and experts
  # whose number is that of the preset.
  def experts(*extra):
    dense = commands.parse(
      ["train", "--config=dense_baseline:quickstart", f"--workdir={tmp_path}/run", *extra]
    )
    return dense.config.model.moe

  moe = experts("--config.model.moe=llama_moe", "--config.model.moe.num_experts=4")
  assert moe.num_experts == 4 and moe.gate_network == "tanh"
  with pytest.raises(ConfigError, match="the config's model is dense"):
    experts("--config.model.moe=llama_moe")


def test_none_on_the_command_line(tmp_path):
  # Catches a placeholder that has no way back to None, and a None that wins against what is said
  # after it.
  def parse(*extra):
    return commands.parse(arguments(tmp_path) + list(extra)).config.model.moe

  flag = "--config.model.moe.capacity_factor"
  switch = "--config.model.moe=switch"
  for said in (
    [switch, f"{flag}=None"],
    [f"{flag}=2.0", f"{flag}=none"],
    [flag, "2", flag, "None"],
  ):
    assert parse(*said).capacity_factor is None
  assert parse(f"{flag}=None", f"{flag}=2").capacity_factor == 2.0
  assert (
    parse(
      "--config.model.moe=switch", "--config.model.moe.eval_capacity_factor=None"
    ).capacity_factor
    == 1.25
  )
  # Options of dispatchers and routers are keys, too.
  factor = "--config.model.moe.dispatcher.ragged_all_to_all.buffer_factor"
  assert parse(f"{factor}=1.5").dispatcher.ragged_all_to_all.buffer_factor == 1.5
  assert parse(f"{factor}=1.5", f"{factor}=None").dispatcher.ragged_all_to_all.buffer_factor is None


ALL = sorted(command_line._keys(commands.load_config("configs/base.py")))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
  st.lists(
    st.tuples(
      st.sampled_from(["--config.", "-config.", "--noconfig.", "--", ""]),
      st.one_of(st.sampled_from(ALL), st.text(max_size=6)),
      st.sampled_from(["=", " ", ""]),
      st.one_of(
        st.text(max_size=6),
        st.integers().map(str),
        st.floats().map(str),
        st.sampled_from(
          ["None", "True", "1e400", "(1,", "('a',)", "[]", "{}", "switch", "9" * 5000]
        ),
      ),
    ),
    min_size=1,
    max_size=3,
  )
)
def test_any_command_line_is_read_or_told_in_a_sentence(words):
  # Catches what absl, ml_collections or ast raise of an odd argument, passed on as a traceback.
  args = ["train", "--config=configs/base.py", "--workdir=x"]
  for dashes, key, equals, value in words:
    args += (
      [f"{dashes}{key}={value}"]
      if equals == "="
      else [f"{dashes}{key}", *[value] * (equals == " ")]
    )
  try:
    commands.parse(args)
  except ConfigError as error:
    assert len(str(error)) < 4000
