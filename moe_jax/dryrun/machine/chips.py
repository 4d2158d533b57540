"""Lists what each kind of accelerator can do, with the sources of the figures.

Memory, memory bandwidth and FLOP/s are those of ONE JAX device, which may be a part of a chip. None
of the figures was measured by this project. The sources are:

- FLOP/s, HBM bandwidth and pod sizes: For TPU v2 to TPU7x, Google Cloud's pages
  (cloud.google.com/tpu/docs/v5p and others). For GPUs, NVIDIA's data sheets of A100 80GB SXM, H100
  SXM, H200 SXM and HGX B200 (dense, without sparsity).
- memory: For TPUs, what the compiler (libtpu 0.0.42) says is available, which is less than what is
  built in. For GPUs, what the driver reports. JAX takes three quarters of that by default, and
  XLA_PYTHON_CLIENT_MEM_FRACTION sets another share.
- link: One direction of one link. For v2 to v4, Jouppi et al. 2023 (arXiv 2304.01433), Table 4.
  From v5e on, the bandwidth of a chip on Google's pages, divided by the number of its links and by
  two for the directions. For NVLink, one direction of all links of a GPU together.
- dcn: A chip's share of its host's network. For v5p, v6e and TPU7x, Google's pages. For v4 and v5e,
  100 Gbit/s for four chips. For GPUs, one InfiniBand port each: HDR (200 Gbit/s) for A100 and NDR
  (400 Gbit/s) for the others.
- clock: The MXU clock of v2 to v5p, computed from the peak FLOP/s. It turns the compiler's
  estimated cycles into seconds. It is left out for chips where it does not fit these estimates.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of accelerator.

  Attributes:
    kind: The name in --topology, such as "v4".
    platform: "tpu" or "cuda", as `jax.experimental.topologies` calls it.
    memory: The bytes of a device that a program may use.
    flops: FLOP/s of bfloat16 matmuls on a device.
    hbm: Bytes/s between a device and its main memory.
    link: Bytes/s in one direction: for TPUs, of one link between neighbouring chips in the torus;
      for GPUs, of all NVLinks of a GPU together.
    dcn: Bytes/s in one direction of a CHIP's share of the network between slices (TPUs) or between
      hosts (GPUs). 0 means unknown.
    devices: The number of JAX devices on a chip, which are cores that are programmed separately and
      share the chip's links.
    clock: The clock in Hz. 0 means unknown.
    limit: The chips along each dimension of the largest torus. It is () for GPUs.
    wraps: The ends of a torus dimension are connected if its length is a multiple of this number.
    named_by: What the number in a product name counts: "cores" (v4-2048) or "chips" (v5e-256).
  """

  kind: str
  platform: str
  memory: float
  flops: float
  hbm: float
  link: float
  dcn: float = 0.0
  devices: int = 1
  clock: float = 0.0
  limit: tuple[int, ...] = ()
  wraps: int = 4
  named_by: str = "chips"

  def shapes(self) -> list[tuple[int, ...]]:
    """Returns every shape of a slice that Google lists, or whose rule it states, or [] for GPUs.

    The sides ascend, except that a side of 1 may come last.
    """
    if len(self.limit) == 2:
      side = max(self.limit)
      sizes = [(2**i, 2**j) for i in range(1, 6) for j in (i, i + 1) if 2**j <= side]
      return [(1, 1)] * (self.devices == 1 and self.named_by == "chips") + sizes
    if not self.limit:
      return []
    small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    cubes = itertools.combinations_with_replacement(range(4, max(self.limit) + 1, 4), 3)

    def fits(shape):
      return all(side <= largest for side, largest in zip(shape, sorted(self.limit), strict=True))

    return small + [shape for shape in cubes if fits(shape)]

  def ring(self, length: int) -> bool:
    """Returns whether the ends of a torus dimension of that many chips are connected."""
    return length >= self.wraps and length % self.wraps == 0


# Returns the `Chip` of a TPU, whose memory is given in GiB.
def _tpu(kind, memory_gib, flops, hbm, link, dcn, limit, **more):
  return Chip(kind, "tpu", memory_gib * GIB, flops, hbm, link, dcn, limit=limit, **more)


CHIPS = {
  chip.kind: chip
  for chip in (
    _tpu(
      "v2",
      7.48,
      23e12,
      350e9,
      62e9,
      0.0,
      (16, 16),
      devices=2,
      clock=0.70e9,
      wraps=16,
      named_by="cores",
    ),
    _tpu(
      "v3",
      15.48,
      61.5e12,
      450e9,
      70e9,
      0.0,
      (32, 32),
      devices=2,
      clock=0.94e9,
      wraps=32,
      named_by="cores",
    ),
    _tpu("v4", 30.75, 275e12, 1200e9, 50e9, 3.125e9, (16, 16, 16), clock=1.05e9, named_by="cores"),
    _tpu("v5e", 15.75, 197e12, 819e9, 50e9, 3.125e9, (16, 16), clock=1.50e9, wraps=16),
    _tpu("v5p", 95.74, 459e12, 2765e9, 100e9, 6.25e9, (16, 20, 28), clock=1.75e9, named_by="cores"),
    _tpu("v6e", 31.25, 918e12, 1638e9, 100e9, 12.5e9, (16, 16), wraps=16),
    _tpu(
      "tpu7x", 94.75, 1153.5e12, 3690e9, 100e9, 12.5e9, (16, 24, 24), devices=2, named_by="cores"
    ),
    Chip("a100", "cuda", 84_974_239_744.0, 312e12, 2039e9, 300e9, 25e9),
    Chip("h100", "cuda", 84_929_347_584.0, 989e12, 3352e9, 450e9, 50e9),
    Chip("h200", "cuda", 150_754_820_096.0, 989e12, 4800e9, 450e9, 50e9),
    Chip("b200", "cuda", 191_503_138_816.0, 2250e12, 7700e9, 900e9, 50e9),
  )
}

# Cores, bytes of shared memory per core, the most of it that a block can opt in to, bytes of L2
# cache, clock in GHz, compute capability, and name.
_GPU_NUMBERS = {
  "a100": (108, 167_936, 166_912, 41_943_040, 1.41, (8, 0), "NVIDIA A100-SXM4-80GB"),
  "h100": (132, 233_472, 232_448, 52_428_800, 1.98, (9, 0), "NVIDIA H100 80GB HBM3"),
  "h200": (132, 233_472, 232_448, 62_914_560, 1.98, (9, 0), "NVIDIA H200"),
  "b200": (148, 233_472, 232_448, 132_644_864, 1.965, (10, 0), "NVIDIA B200"),
}


def gpu_target(kind: str) -> str:
  """Returns XLA's GpuTargetConfigProto of a GPU as text, for compiling without the device.

  It is made from the numbers above, and is not a vendor's file.

  Args:
    kind: A key of `CHIPS` whose platform is "cuda".
  """
  cores, shared, opt_in, cache, clock, (major, minor), name = _GPU_NUMBERS[kind]
  lanes = 64 if kind == "a100" else 128
  fields = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49_152,
    "shared_memory_per_core": shared,
    "threads_per_core_limit": 2048,
    "core_count": cores,
    "fpus_per_core": lanes,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "memory_bandwidth": int(CHIPS[kind].hbm),
    "l2_cache_size": cache,
    "clock_rate_ghz": clock,
    "device_memory_size": int(CHIPS[kind].memory),
    "shared_memory_per_block_optin": opt_in,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
  }
  info = " ".join(f"{key}: {value}" for key, value in fields.items())
  return (
    f"gpu_device_info {{ {info} cuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
    'platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } '
    f'runtime_version {{ major: 12 minor: 8 patch: 0 }} device_description_str: "{name}"'
  )


def most_cubic(shapes: list[tuple[int, ...]], chips: int) -> tuple[int, ...] | None:
  """Returns the shape with that many chips that is nearest to a cube, or None if there is none."""
  # Among shapes of equal product, the sum of the sides is smallest for the most cubic one.
  fits = [shape for shape in shapes if math.prod(shape) == chips]
  return min(fits, key=sum) if fits else None
