"""Tests that the figures of the accelerators are plausible, and that their shapes are real pods."""

import math

import pytest

from moe_jax.dryrun.machine.chips import CHIPS, GIB, gpu_target, most_cubic

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", CHIPS)
def test_each_figure_is_in_its_unit(kind):
  # Catches GB/s instead of bytes/s, TFLOP/s instead of FLOP/s, memory in GiB, bits instead of
  # bytes, and figures of a chip instead of a core.
  chip = CHIPS[kind]
  assert 7 * GIB < chip.memory < 192 * GIB
  assert 2e13 < chip.flops < 3e15 and 3e11 < chip.hbm < 1e13 and 5e10 <= chip.link <= 9e11
  # FLOPs per byte lie in this range for every accelerator of the last ten years.
  assert 50 < chip.flops / chip.hbm < 600
  assert chip.dcn < chip.link and chip.devices in (1, 2)


@pytest.mark.parametrize(
  "kind, chips, cores",
  [
    ("v2", 256, 512),
    ("v3", 1024, 2048),
    ("v4", 4096, 8192),
    ("v5e", 256, 256),
    ("v5p", 8960, 17_920),
    ("v6e", 256, 256),
    ("tpu7x", 9216, 18_432),
  ],
)
def test_the_largest_slice_is_a_pod(kind, chips, cores):
  # The chips of a pod are those on Google's pages. Catches a limit in cores instead of chips, and a
  # mistyped side of a pod.
  chip = CHIPS[kind]
  assert math.prod(chip.limit) == chips == max(math.prod(shape) for shape in chip.shapes())
  assert cores == chips * (2 if chip.named_by == "cores" else 1)


def test_rings_close_only_in_whole_cubes_or_pods():
  # Catches a line of 8 in a v5e slice that is taken for a ring, which would double its bandwidth.
  assert CHIPS["v4"].ring(4) and CHIPS["v4"].ring(12) and not CHIPS["v4"].ring(2)
  assert CHIPS["v5e"].ring(16) and not CHIPS["v5e"].ring(8)


def test_the_most_cubic_shape():
  # Catches a choice of v4:4x4x64 for 1024 chips.
  assert most_cubic(CHIPS["v4"].shapes(), 1024) == (8, 8, 16)
  assert most_cubic(CHIPS["v5e"].shapes(), 7) is None


def test_a_gpu_is_described_to_the_compiler():
  # Catches a field of another GPU, and unbalanced braces.
  text = gpu_target("a100")
  assert (
    "major: 8 minor: 0" in text and "core_count: 108" in text and text.count("{") == text.count("}")
  )
