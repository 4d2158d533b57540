"""Tests the FLOPs of dots, of convolutions, of dots written as convolutions, and of kernels."""

import pathlib

import pytest

from moe_jax.hlo import matmuls
from moe_jax.hlo.module import parse

pytestmark = pytest.mark.unit
SNIPPETS = pathlib.Path(__file__).parent / "snippets"


def counted(name):
  module = parse((SNIPPETS / f"{name}.hlo").read_text())
  return sorted(f for c in module.computations.values() for i in c if (f := matmuls.flops(c, i)))


def of(line, *operands):
  lines = [f"  %{'abc'[i]} = {shape} parameter({i})\n" for i, shape in enumerate(operands)]
  [computation] = parse(
    f"ENTRY %m () -> () {{\n{''.join(lines)}  ROOT {line}\n}}\n"
  ).computations.values()
  return matmuls.flops(computation, computation.instructions[computation.root])


def test_what_a_tpu_makes_of_products():
  # Catches windows over a dilated input that are counted in full (36 times the batched dot), labels
  # of the kernel that are read in the wrong order, and padding that is counted as products. With a
  # window of 3, stride 2, size 31 and "SAME" padding, 46 of the 48 positions along a dimension meet
  # the image.
  assert counted("v5p_products") == sorted(
    [2 * 128 * 512 * 64, 2 * 6 * 128 * 96 * 128, 2 * 8 * 46**2 * 16 * 32]
  )


def test_dots():
  # Catches batch dimensions that are counted twice, and a depth that is read from the right
  # operand.
  dims = (
    "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
  )
  assert of(f"%d = f32[3,4,6] dot(%a, %b), {dims}", "f32[3,4,5]", "f32[3,5,6]") == 2 * 3 * 4 * 5 * 6
  assert of("%d = f32[4,6] dot(%a, %b)", "f32[4]", "f32[6]") == 2 * 4 * 6  # nothing contracted


@pytest.mark.parametrize(
  "size, window, out, pad, stride, dilate, window_dilate",
  [
    (5, 3, 5, 1, 1, 1, 1),
    (31, 3, 16, 1, 2, 1, 1),
    (4, 4, 4, 0, 3, 4, 1),
    (2, 2, 2, 0, 1, 2, 1),
    (7, 3, 3, 0, 1, 1, 2),
    (6, 2, 9, -1, 1, 2, 1),
    (4, 4, 4, 3, 3, 4, 1),
  ],
)
def test_windows(size, window, out, pad, stride, dilate, window_dilate):
  # Catches any of the seven numbers that is left out. The expected value is counted one by one in
  # the dilated and padded input.
  dilated = [int(i % dilate == 0) for i in range((size - 1) * dilate + 1)]

  def at(i):
    return dilated[i] if 0 <= i < len(dilated) else 0

  expected = sum(
    at(o * stride - pad + w * window_dilate) for o in range(out) for w in range(window)
  )
  assert matmuls._pairs(size, window, out, pad, stride, dilate, window_dilate) == expected


def test_grouped_convolution():
  # Catches that all channels of the input are counted, although the kernel has only those of a
  # group.
  line = (
    "%d = f32[2,8,8,12] convolution(%a, %b), window={size=1x1}, dim_labels=b01f_01io->b01f, "
    "feature_group_count=3"
  )
  assert of(line, "f32[2,8,8,6]", "f32[1,1,2,12]") == 2 * 2 * 8 * 8 * 2 * 12


def test_kernels():
  # Catches kernels of ragged dots (128 rows, 256 by 128 weights) and of softmax (4 x 256 rows over
  # 256 scores, 128 wide) that count as nothing, library calls that count as nothing, and a kernel
  # that states no work but gets a number.
  assert counted("v5p_ragged") == [2 * 128 * 256 * 128]
  assert counted("v5e_online_softmax") == [2 * 4 * 256 * 256 * 128]
  gemm = (
    'custom_call_target="__cublas$gemm", '
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
  )
  assert (
    of(f"%d = (f32[4,6], s8[99]) custom-call(%a, %b), {gemm}", "f32[4,5]", "f32[5,6]")
    == 2 * 4 * 5 * 6
  )
  assert of('%d = f32[4,6] custom-call(%a), custom_call_target="tpu_custom_call"', "f32[4,5]") == 0


@pytest.mark.parametrize("kernel, features", [("fwd", 5 + 7), ("dq", 5 + 7 + 5), ("dkv", 24)])
def test_splash_attention(kernel, features):
  # Two rows of 6 heads and 32 tokens, of which 3 of 4 blocks are computed, have 2 * 6 * 32 * 24
  # scores. Catches blocks that are masked and counted, heads of keys in place of queries, and
  # matmuls of another kernel.
  line = (
    f"%splash_mha_{kernel}_segmented.1 = bf16[2,6,32,7] custom-call(%a, %b, %c), "
    'custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(f)/splash_3_of_4_blocks/vmap()/pallas_call"}'
  )
  scores = 2 * 6 * 32 * 32 * 3 / 4
  shapes = ("bf16[2,6,32,5]", "bf16[2,3,32,5]", "bf16[2,3,32,7]")
  assert of(line, *shapes) == 2 * scores * features
