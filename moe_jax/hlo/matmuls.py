"""Counts the FLOPs of one instruction: a dot, a convolution, or a kernel that states its work.

On TPUs a dot may be written as a convolution.
"""

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
# The kernels of splash attention, and the scope that `layers.splash_attention` puts around them.
_SPLASH = re.compile(r"splash_mha_(fwd|dq|dkv)")
_SPLASH_BLOCKS = re.compile(r"splash_(\d+)_of_(\d+)_blocks")
_GEMM = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)[^"]*"')


def flops(computation: Computation, instruction: Instruction) -> float:
  """Returns the matmul FLOPs of one execution of an instruction, at 2 a multiply-add.

  The result is 0 for an instruction that is not a matmul, and for a kernel (a custom call) that
  does not state its work. A kernel states it in one of three ways:

  - by a cost estimate, as the TPU's own kernels for ragged dots do, and those Pallas kernels that
    are given one;
  - by its shapes, as cuBLAS calls do, and the TPU's online softmax, which includes the dot that
    follows the softmax;
  - by its shapes and the number of its blocks, which splash attention has in its scope.

  Args:
    computation: The computation that contains the instruction.
    instruction: Any instruction.

  Raises:
    ValueError: If an operand is not defined, or if a convolution has no dim_labels.
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
    # Operand 0 holds the scores, and the dot contracts their last dimension with operand 1.
    scores = computation.operand(instruction, 0).shapes[0].dims
    return 2.0 * math.prod(instruction.shapes[0].dims) * scores[-1]
  if kernel := _SPLASH.search(instruction.name):
    return _splash(computation, instruction, kernel[1])
  return 0.0


def _splash(computation: Computation, instruction: Instruction, kernel: str) -> float:
  """Returns the FLOPs of a kernel of splash attention, whose masked blocks are not computed.

  Args:
    computation: The computation that contains the kernel.
    instruction: The kernel, whose first arrays of three dimensions or more that are not of whole
      numbers are queries [..., H, L, P], keys and values [..., K, L, U].
    kernel: "fwd", or "dq" or "dkv" for the gradients of queries and of keys and values.
  """
  shapes = [computation.operand(instruction, i).shapes[0] for i in range(len(instruction.operands))]
  queries, _, values = [s.dims for s in shapes if "f" in s.dtype and len(s.dims) > 2][:3]
  p, u = queries[-1], values[-1]
  # Scores and averages; or the scores again, the gradients of weights, and those of the arguments.
  features = {"fwd": p + u, "dq": 2 * p + u, "dkv": 2 * p + 2 * u}[kernel]
  blocks = instruction.find(_SPLASH_BLOCKS)
  share = int(blocks[1]) / int(blocks[2]) if blocks else 1.0
  return 2.0 * math.prod(queries[:-1]) * values[-2] * share * features


def is_unknown_gemm(instruction: Instruction) -> bool:
  """Returns whether it is a library's matmul that does not state the dimensions it contracts."""
  return bool(
    instruction.opcode == "custom-call"
    and instruction.find(_GEMM)
    and not instruction.find(_CONTRACTED)
    and not instruction.find(_ESTIMATE)
  )


def _depth(computation: Computation, instruction: Instruction, pattern: str) -> int:
  """Returns the multiply-adds for each element of the result: the product of contracted sizes."""
  left = computation.operand(instruction, 0).shapes[0].dims
  contracted = instruction.find(pattern)
  return math.prod(left[int(d)] for d in re.findall(r"\d+", contracted[1])) if contracted else 1


def _convolution(computation: Computation, instruction: Instruction) -> float:
  """Returns the FLOPs of a convolution, counting only products with elements that exist.

  Padding and the holes of a dilated input are left out, because a TPU writes a batched dot as a
  convolution whose window runs over a dilated and mostly empty input.
  """
  if not (labels := instruction.find(_LABELS)):
    raise instruction.error("a convolution without dim_labels")
  left, right, out = labels.groups()
  sizes = [computation.operand(instruction, i).shapes[0].dims for i in (0, 1)] + [
    instruction.shapes[0].dims
  ]
  window = (
    dict(part.split("=") for part in match[1].split())
    if (match := instruction.find(_WINDOW))
    else {}
  )
  # In dim_labels "b" is the batch, "f" the features, "i" the kernel's input features, and the
  # digits are the spatial dimensions.
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
  """Counts the (output, window) positions along one dimension that meet an element of the input."""
  count = 0
  starts = np.arange(out) * stride - pad
  for offset in range(window):
    # Positions in the dilated input, of which only every `dilate`-th holds an element.
    positions = starts + offset * window_dilate
    count += int(
      ((positions >= 0) & (positions <= (size - 1) * dilate) & (positions % dilate == 0)).sum()
    )
  return count
