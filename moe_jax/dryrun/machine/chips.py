"""What accelerators can do: one table, with its sources.

Bytes, bytes a second and FLOP/s are those of ONE device of JAX. Nothing here was measured by us:

- FLOP/s, HBM bandwidth, pod sizes: Google Cloud's pages on TPU v2 to TPU7x
  (cloud.google.com/tpu/docs/v5p and others); NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200
  SXM and HGX B200 (dense, without sparsity).
- memory: for TPUs, what the compiler (libtpu 0.0.42) says is available, which is less than what is
  built in; for GPUs, what the driver reports, of which JAX takes three quarters unless
  XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
- link: one direction of one link. v2 to v4: Jouppi et al. 2023 (arXiv 2304.01433), Table 4; from
  v5e on, the bandwidth a chip on Google's pages, divided by its links and by both directions.
  NVLink: one direction of all links of a GPU together.
- dcn: a chip's share of its host's network. Google's pages for v5p, v6e and TPU7x; 100 Gbit/s for
  four chips of v4 and v5e. GPUs: one InfiniBand port each, HDR (200 Gbit/s) for A100 and NDR
  (400 Gbit/s) for the others.
- clock: the MXU clock of v2 to v5p, computed from the peak; it turns the compiler's estimated
  cycles into seconds. It is left out where it does not fit them.
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
    kind: the name in --topology.
    platform: "tpu" or "cuda", as `jax.experimental.topologies` calls it.
    memory: bytes that a program may use.
    flops: FLOP/s of bfloat16 matmuls.
    hbm: bytes/s between memory and chip.
    link: bytes/s, one direction, of one link between neighbours in the torus; of GPUs, of all of
      NVLink together.
    dcn: bytes/s, one direction, of a CHIP's share of the network between slices; of GPUs, between
      hosts. 0: unknown.
    devices: JAX devices a chip (cores that are programmed singly); they share its links.
    clock: Hz; 0: unknown.
    limit: the largest torus, chips a dimension; () for GPUs.
    wraps: lengths of a torus' dimension, in whose multiples the ends are connected.
    named_by: what the number in a marketing name counts: "cores" (v4-2048) or "chips" (v5e-256).
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
    """Every shape of a slice that Google lists or whose rule it states, sides ascending but for a
    1; [] for GPUs."""
    if len(self.limit) == 2:
      side = max(self.limit)
      sizes = [(2**i, 2**j) for i in range(1, 6) for j in (i, i + 1) if 2**j <= side]
      return [(1, 1)] * (self.devices == 1 and self.named_by == "chips") + sizes
    if not self.limit:
      return []
    small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    cubes = itertools.combinations_with_replacement(range(4, max(self.limit) + 1, 4), 3)

    def fits(shape):
      return all(side <= most for side, most in zip(shape, sorted(self.limit), strict=True))

    return small + [shape for shape in cubes if fits(shape)]

  def ring(self, length: int) -> bool:
    """Whether the ends of a torus' dimension of that many chips are connected."""
    return length >= self.wraps and length % self.wraps == 0


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

# cores, shared memory a core and opt-in bytes, L2 bytes, GHz, compute capability, name
_GPU_NUMBERS = {
  "a100": (108, 167_936, 166_912, 41_943_040, 1.41, (8, 0), "NVIDIA A100-SXM4-80GB"),
  "h100": (132, 233_472, 232_448, 52_428_800, 1.98, (9, 0), "NVIDIA H100 80GB HBM3"),
  "h200": (132, 233_472, 232_448, 62_914_560, 1.98, (9, 0), "NVIDIA H200"),
  "b200": (148, 233_472, 232_448, 132_644_864, 1.965, (10, 0), "NVIDIA B200"),
}


def gpu_target(kind: str) -> str:
  """XLA's GpuTargetConfigProto of a GPU, as text: what the deviceless compiler must know of it. Not
  a vendor's file."""
  cores, shared, most, cache, clock, (major, minor), name = _GPU_NUMBERS[kind]
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
    "shared_memory_per_block_optin": most,
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
  """Of the shapes of that many chips the one nearest to a cube."""
  fits = [shape for shape in shapes if math.prod(shape) == chips]
  return min(fits, key=sum) if fits else None
