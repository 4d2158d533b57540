"""Tests what each dispatcher sends on TPUs in a layer and step.

The real step is compiled for slices that are not attached.
"""

import collections
import importlib.util

import pytest
import tiny

from moe_jax.dispatch import DISPATCHERS
from moe_jax.dryrun import compile
from moe_jax.dryrun.machine import topology
from moe_jax.hlo.program import analyse

pytestmark = [
  pytest.mark.smoke,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[dryrun]'"
  ),
]

# The collectives of one layer along "expert", forward and backward. An expert has three weights:
# up, gate and down.
SENDS = {
  "einsum": {"all-to-all": 4},
  # Buffers are sent to the experts and back.
  "all_to_all": {"all-to-all": 4},
  # GSPMD adds two more around the scatter-add of the tokens' gradient.
  "scatter": {"all-to-all": 6},
  "ragged_all_to_all": {"ragged-all-to-all": 4},
  # Tokens are gathered and sums are scattered. The backward pass does the reverse.
  "all_gather": {"all-gather": 2, "reduce-scatter": 2},
  # Weights are gathered twice, for the forward and the backward pass.
  "grouped": {"all-gather": 6, "reduce-scatter": 3},
}
KERNELS = {
  "grouped": ["ragged_dot"],
  "all_gather": ["ragged_dot"],
  "ragged_all_to_all": ["ragged_dot", "ragged_all_to_all"],
}
# Bytes of the buffers for a device's row: f S = 32 slots of width 256 in float32, at f = 1.
BUFFERS = 32 * 256 * 4
# Collectives of at most this many bytes send counts, and sums of losses and metrics. Those of
# tokens and weights are larger.
SMALL = 8192


def compiled(directory, dispatcher, slices, **mesh):
  """Compiles the step of a model of one layer with 16 experts for slices of 2x2 chips.

  Returns:
    The StableHLO text and the collectives.
  """
  machine = topology.parse("v5e:2x2", slices)
  changes = {f"mesh__{axis}": size for axis, size in mesh.items()}
  config = tiny.config(
    directory,
    model__vocab_size=264,
    model__d_model=256,
    model__num_layers=1,
    model__moe__first=0,
    model__moe__num_experts=16,
    model__moe__d_ff=128,
    model__moe__dispatcher__name=dispatcher,
    train__batch_size=machine.num_devices,
    **changes,
  )
  if dispatcher in ("einsum", "scatter", "all_to_all"):
    config.model.moe.capacity_factor = 1.0
  lowered = compile.lower(
    config, compile.make_mesh(config, machine, topology.make_devices(machine))
  )
  text = compile.compile(lowered, machine, fast=True)["text"]
  return lowered.stage.as_text(), analyse(text, dict(lowered.mesh.shape)).collectives


@pytest.mark.parametrize("dispatcher", tiny.often({"ragged_all_to_all"}, DISPATCHERS))
def test_what_is_sent(dispatcher, tmp_path, monkeypatch):
  # Catches buffers of tokens that are gathered on all devices, an exchange that is repeated in the
  # backward pass, weights of experts that are gathered although tokens should move, and the loops
  # and the padded exchange for CPUs in a program for TPUs.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  program, found = compiled(tmp_path, dispatcher, 1, data=1, expert=4)
  assert [
    kernel for kernel in ("ragged_dot", "ragged_all_to_all") if kernel in program
  ] == KERNELS.get(dispatcher, [])
  sent = collections.Counter()
  for one in found:
    if "/ffn/" in one.op_name and "_logits" not in one.op_name and one.bytes > SMALL:
      sent[one.kind] += one.count
      # With these dispatchers each collective carries the same slots.
      if dispatcher in ("einsum", "scatter", "all_to_all"):
        assert one.bytes == BUFFERS, found
  assert sent == SENDS[dispatcher], found


@pytest.mark.parametrize(
  "dispatcher, exchange, times",
  [
    # One of the five moves the embedding's gradient.
    ("all_to_all", "all-to-all", 5),
    pytest.param("ragged_all_to_all", "ragged-all-to-all", 4, marks=pytest.mark.every_variant),
  ],
)
def test_what_is_sent_between_slices(dispatcher, exchange, times, tmp_path, monkeypatch):
  # Catches tokens that are sent to experts of another slice, and a mesh whose slices lie along
  # another axis than data.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  _, found = compiled(tmp_path, dispatcher, 2, data=2, expert=4)
  assert all(
    one.axes == (("data",) if one.kind.startswith("dcn-") else ("expert",)) for one in found
  ), found
  assert {one.kind for one in found if "data" in one.axes} == {
    "dcn-all-reduce",
    "dcn-all-gather",
  }, found
  assert sum(one.count for one in found if one.kind == exchange and one.bytes > SMALL) == times, (
    found
  )
