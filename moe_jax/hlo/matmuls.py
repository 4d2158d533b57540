"""FLOPs of one instruction: dots, convolutions (on TPU a dot is one too), and kernels that say what
they do."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from moe_jax.hlo.instruction import Instruction
from moe_jax.hlo.module import Computation

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_ESTIMATE = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
_CONTRACTED = r'"lhs_contracting_dimensions":\[([^\]]*)\]'
_GEMM = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)[^"]*"')


def flops(computation: Computation, instruction: Instruction) -> float:
  """FLOPs (2 a multiply-add) of one execution; 0 for what is not a matmul, and for kernels that do
  not tell.

  Kernels (custom calls) tell by a cost estimate, as the TPU's own for ragged dots and those of
  Pallas that are given one; by their shapes, as the TPU's online softmax (a dot follows inside) and
  cuBLAS. Others count as nothing.
  """
  if instruction.opcode == "dot":
    contracted = r"lhs_contracting_dims=\{([\d,]*)\}"
    return (
      2.0 * math.prod(instruction.shapes[0].dims) * _depth(computation, instruction, contracted)
    )
  if instruction.opcode == "convolution":
    return _convolution(computation, instruction)
  if instruction.opcode != "custom-call":
    return 0.0
  if estimate := instruction.find(_ESTIMATE):
    return float(estimate[1])
  if instruction.find(_GEMM):
    return (
      2.0 * math.prod(instruction.shapes[0].dims) * _depth(computation, instruction, _CONTRACTED)
    )
  if instruction.name.startswith("online-softmax") and len(instruction.operands) == 2:
    scores = computation.operand(instruction, 0).shapes[0].dims
    return 2.0 * math.prod(instruction.shapes[0].dims) * scores[-1]
  return 0.0


def is_unknown_gemm(instruction: Instruction) -> bool:
  """Returns whether it is a library's matmul that does not tell which dimensions it contracts."""
  return bool(
    instruction.opcode == "custom-call"
    and instruction.find(_GEMM)
    and not instruction.find(_CONTRACTED)
    and not instruction.find(_ESTIMATE)
  )


def _depth(computation: Computation, instruction: Instruction, pattern: str) -> int:
  """Multiply-adds an element of the result: the product of the dimensions that are contracted."""
  left = computation.operand(instruction, 0).shapes[0].dims
  contracted = instruction.find(pattern)
  return math.prod(left[int(d)] for d in re.findall(r"\d+", contracted[1])) if contracted else 1


def _convolution(computation: Computation, instruction: Instruction) -> float:
  """Only products with elements that exist: a TPU writes a batched dot as a window over dilated,
  mostly empty space."""
  if not (labels := instruction.find(_LABELS)):
    raise instruction.error("a convolution without dim_labels")
  left, right, out = labels.groups()
  sizes = [computation.operand(instruction, i).shapes[0].dims for i in (0, 1)] + [
    instruction.shapes[0].dims
  ]
  window = (
    dict(part.split("=") for part in found[1].split())
    if (found := instruction.find(_WINDOW))
    else {}
  )
  products = sizes[1][right.index("i")] * sizes[2][out.index("f")] * sizes[2][out.index("b")]
  spatial = sorted(c for c in out if c.isdigit())
  for n, label in enumerate(spatial):

    def take(key, default, n=n):
      return window[key].split("x")[n] if key in window else default

    pad = tuple(int(p) for p in take("pad", "0_0").split("_"))
    products *= _pairs(
      sizes[0][left.index(label)],
      sizes[1][right.index(label)],
      sizes[2][out.index(label)],
      pad[0],
      int(take("stride", 1)),
      int(take("lhs_dilate", 1)),
      int(take("rhs_dilate", 1)),
    )
  return 2.0 * products


@functools.lru_cache(maxsize=1024)
def _pairs(
  size: int, window: int, out: int, pad: int, stride: int, dilate: int, window_dilate: int
) -> int:
  """(output, window) positions along one dimension that meet an element of the input."""
  count = 0
  starts = np.arange(out) * stride - pad
  for offset in range(window):
    at = starts + offset * window_dilate
    count += int(((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)).sum())
  return count
