"""Parses names of machines and makes their devices, although the machines are not attached.

A name is a kind and a shape: `v4:8x8x16` is a TPU slice in chips along each dimension of its torus,
and `h100:128x8` is a number of hosts times GPUs per host.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from moe_jax.dryrun.machine.chips import CHIPS, Chip, gpu_target, most_cubic
from moe_jax.errors import ConfigError

# Settings with which libtpu works on a host without TPUs. It queries no metadata server, writes no
# log files and takes no lock, so that several dry runs may run at the same time.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v4-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_LOG_DIR": "disabled",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}
GPU_WHEELS = "jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12"
# Other names that are in use, and the kind that they mean.
_ALIASES = {
  "v5litepod": "v5e",
  "v5lite": "v5e",
  "v5": "v5p",
  "trillium": "v6e",
  "ironwood": "tpu7x",
  "v7": "tpu7x",
  "7x": "tpu7x",
  "v7x": "tpu7x",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A machine.

  Attributes:
    chip: The kind of its chips.
    shape: For TPUs, the chips along each dimension of a slice's torus. For GPUs, (hosts, GPUs per
      host).
    slices: The number of equal slices.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def num_devices(self) -> int:
    """The number of JAX devices in all slices."""
    return self.slices * self.chip.devices * math.prod(self.shape)

  def __str__(self) -> str:
    name = _full_name(self.chip, self.shape)
    return f"{self.slices} x {name}" if self.slices > 1 else name


def parse(text: str | None, slices: int = 1) -> Topology:
  """Parses the name of a machine.

  Args:
    text: The name, as KIND:AxB or KIND:AxBxC.
    slices: The number of slices.

  Raises:
    ConfigError: If the name is missing, if the kind is unknown, if the kind has no such shape, if
      `slices` is below 1, or if the name is a product's (v4-2048). Product names are refused
      because they count cores for some kinds and chips for others; the message proposes the name
      that was probably meant.
  """
  if not text:
    raise ConfigError(
      "topology", text, "is missing; name a machine, as in --topology=v4:8x8x16 or h100:128x8"
    )
  # Each part of this pattern may be empty, so that it matches any text exactly once.
  ((kind, separator, sizes),) = re.findall(r"(?s)\A([^:\-]*)([:\-]?)(.*)", text.strip().lower())
  kind = _ALIASES.get(kind, kind)
  if kind not in CHIPS:
    raise ConfigError(
      "topology", text, f"unknown kind; known: {', '.join(CHIPS)}, as in v4:8x8x16 or h100:128x8"
    )
  chip = CHIPS[kind]
  if separator != ":" or not re.fullmatch(r"\d+(x\d+)+", sizes):
    raise ConfigError("topology", text, _proposal(chip, separator, sizes))
  if slices < 1:
    raise ConfigError("slices", slices, "must be at least 1")
  shape = tuple(map(int, sizes.split("x")))
  _check_shape(text, chip, shape)
  return Topology(chip, shape, slices)


def _proposal(chip: Chip, separator: str, sizes: str) -> str:
  """Returns the message for a name without a shape, with the name that was probably meant."""
  example = (128, 8) if chip.platform == "cuda" else chip.shapes()[-1]
  words = f"must be a kind and a shape, as in {_full_name(chip, example)}"
  if not sizes.isdecimal() or len(sizes) > 9 or not int(sizes):
    return words
  count = int(sizes)
  if chip.platform == "cuda":
    return f"{words}; did you mean {chip.kind}:{-(-count // 8)}x8 (hosts x GPUs)?"
  cores = separator == "-" and chip.named_by == "cores"
  # Chips that are named by their cores have two.
  near = most_cubic(chip.shapes(), count // 2 if cores else count)
  counted = f"its number counts {'cores, two a chip' if cores else 'chips'}"
  return f"{words}; {counted}: did you mean {_full_name(chip, near)}?" if near else words


def _full_name(chip: Chip, shape: Sequence[int]) -> str:
  return f"{chip.kind}:{'x'.join(map(str, shape))}"


def _check_shape(text: str, chip: Chip, shape: Sequence[int]) -> None:
  """Raises ConfigError if there is no machine of that shape; `text` is what the user wrote."""
  if chip.platform == "cuda":
    if len(shape) != 2 or min(shape) < 1 or shape[1] > 8:
      raise ConfigError(
        "topology", text, f"must be hosts x GPUs a host, at most 8, as in {chip.kind}:128x8"
      )
    return
  shapes = chip.shapes()
  if sorted(shape) in map(sorted, shapes):
    return
  if len(shape) != len(chip.limit):
    raise ConfigError(
      "topology",
      text,
      f"a {chip.kind} slice has {len(chip.limit)} dimensions, as in {_full_name(chip, shapes[-1])}",
    )

  def distance(s):
    return sum(abs(math.log(max(a, 1) / b)) for a, b in zip(sorted(shape), sorted(s), strict=True))

  near = min(shapes, key=distance)
  rule = "multiples of 4" if len(chip.limit) == 3 else "powers of 2, one at most twice the other"
  raise ConfigError(
    "topology",
    text,
    f"there is no such {chip.kind} slice: sides are {rule}, up to "
    f"{'x'.join(map(str, chip.limit))}; nearest: {_full_name(chip, near)}",
  )


def make_devices(topology: Topology) -> list:
  """Returns devices of a machine that is not attached, for which programs can be compiled only.

  As a side effect, JAX itself is set to use the CPU.

  Raises:
    ConfigError: If the compiler for that machine is not installed.
  """
  from jax.experimental import topologies

  chip = topology.chip
  os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
  if chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      "topology",
      str(topology),
      "the TPU compiler (libtpu) is not installed; pip install "
      "-e '.[dryrun]' brings it, and needs no TPU",
    )
  if chip.platform == "cuda" and importlib.util.find_spec("jax_cuda12_plugin") is None:
    raise ConfigError(
      "topology",
      str(topology),
      "the CUDA compiler is not installed; it needs no GPU: pip install "
      f"--no-deps {GPU_WHEELS}, the first two of jax's version {jax.__version__}",
    )
  # JAX itself stays on the CPU. It looks for no accelerator, and uses none even if there is one.
  os.environ["JAX_PLATFORMS"] = "cpu"
  jax.config.update("jax_platforms", "cpu")
  name, options = _request(topology)
  return list(
    topologies.get_topology_desc(platform=chip.platform, topology_name=name, **options).devices
  )


def _request(topology: Topology) -> tuple[str, dict[str, Any]]:
  """Returns the topology name and the options for `get_topology_desc`."""
  chip, shape = topology.chip, "x".join(map(str, topology.shape))
  if chip.platform == "cuda":
    return "", {"target_config": gpu_target(chip.kind), "topology": f"{topology.slices}x{shape}"}
  options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
  if chip.kind == "v4":
    # Without this there would be two devices per chip, which is not how a v4 is used in practice.
    options["chip_config_name"] = "megacore"
  # Each of these two shapes is one host, for which libtpu's default bounds do not fit.
  if math.prod(topology.shape) == 1:
    options["chips_per_host_bounds"] = [1, 1, 1]
  elif sorted(topology.shape) == [2, 4] and len(topology.shape) == 2:
    options["chips_per_host_bounds"] = [2, 4, 1]
  return f"{chip.kind}:{shape}", options
