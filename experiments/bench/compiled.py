"""Compiles a dropless layer for accelerators that are not there, and counts its FLOPs and memory.

A program that multiplies every row with every expert gives the right values, so that only its
compiled form shows it. Nothing is run and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib

from experiments.common.command_line import check_folder
from experiments.common.tables import replace
from moe_jax.dispatch.grouped import GROUPED_MATMULS
from moe_jax.dispatch.ragged_matmul import STEPS
from moe_jax.dispatch.size_classes import layout
from moe_jax.dryrun.machine import topology
from moe_jax.errors import choose
from moe_jax.experts import Experts
from moe_jax.hlo.flops import hlo_matmul_flops

PAGE = pathlib.Path(__file__).with_name("README.md")
RESULTS = pathlib.Path(__file__).with_name("compiled.json")
CHIPS = {
  "v4": "v4:2x2x1",
  "v5e": "v5e:1x1",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:1x1",
  "h100": "h100:1x1",
}
EXPERTS = (8, 64)


class Sizes(NamedTuple):
  """The sizes of the layer: tokens, their experts, width, and hidden width of a SwiGLU expert."""

  tokens: int = 4096
  k: int = 2
  d_model: int = 1024
  d_ff: int = 2048


def measure(chip: str, experts: int, sizes: Sizes) -> dict[str, dict[str, float]]:
  """Returns the FLOPs and the temporaries of the forward pass, and of both passes together.

  Args:
    chip: A key of `CHIPS`.
    experts: The number of experts on the device.
    sizes: The sizes of the layer. Activations are bfloat16 and weights float32.

  Returns:
    {"forward", "both"} -> {"flops": over the ideal, "temporaries": MiB}. The ideal are the products
    of the rows that are assigned, under an even load.
  """
  machine = topology.parse(CHIPS[chip])
  device, *_ = topology.make_devices(machine)
  place = jax.sharding.SingleDeviceSharding(device)

  def abstract(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  t, k, d, f = sizes
  apply = GROUPED_MATMULS[machine.chip.platform]
  up, down = (abstract(experts, *shape, dtype=jnp.float32) for shape in ((d, f), (f, d)))
  plan = tuple(abstract(t * k, dtype=dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32))
  args = (*plan, abstract(t, d), Experts(up, down, up, "swiglu"))

  def both(d_y, token, expert, gate, x, weights):
    y, pull = jax.vjp(lambda *rest: apply(token, expert, *rest), gate, x, weights)
    return y, pull(d_y)

  # The loops of programs without a grouped kernel run as often as an even load makes them.
  load = jnp.full(experts, t * k // experts)
  trips = layout(load, t * k).trips() | (
    layout(load, t * k, STEPS).trips() if machine.chip.platform == "tpu" else {}
  )
  ideal, found = 2.0 * t * k * d * f * 3, {}
  for name, function, arguments in (
    ("forward", apply, args),
    ("both", both, (abstract(t, d, dtype=jnp.float32), *args)),
  ):
    compiled: Any = jax.jit(function).lower(*arguments).compile()
    found[name] = {
      "flops": hlo_matmul_flops(compiled.as_text(), trips)
      / (ideal * (1 if name == "forward" else 3)),
      "temporaries": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
  return found


def table(results: dict[str, dict[str, Any]]) -> str:
  """Returns the results of all versions of JAX as a Markdown table."""
  lines = [
    "| chip | compiler | experts | forward | forward + backward | temporaries, MiB |",
    "|---|---|---|---|---|---|",
  ]
  for row in sorted(results.values(), key=lambda row: (row["chip"], row["jax"], row["experts"])):
    forward, both = row["forward"], row["both"]
    lines.append(
      f"| {row['chip']} | jax {row['jax']}, {row['compiler']} | {row['experts']} | "
      f"{forward['flops']:.2f} | {both['flops']:.2f} | "
      f"{forward['temporaries']:.0f} / {both['temporaries']:.0f} |"
    )
  return "\n".join(lines)


def _compiler(chip: str) -> str:
  """Returns the name and the version of the compiler's package."""
  import importlib.metadata

  name = "jax-cuda12-plugin" if chip == "h100" else "libtpu"
  return f"{name} {importlib.metadata.version(name)}"


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("--chips", default=",".join(CHIPS), help=f"of {', '.join(CHIPS)}")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file that the results are added to")
  parser.add_argument("--write", action="store_true", help="put the table of --out into README.md")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  chips = [choose("chips", name, list(CHIPS)) for name in options.chips.split(",")]
  check_folder("out", options.out)
  results: dict[str, dict[str, Any]] = {}
  if options.out and options.out.exists():
    results = json.loads(options.out.read_text())
  for chip in chips:
    for experts in EXPERTS:
      key = f"{chip} {experts} {jax.__version__}"
      print(f"compiling for {chip}, {experts} experts", flush=True)
      results[key] = {
        "chip": chip,
        "experts": experts,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "compiler": _compiler(chip),
        **measure(chip, experts, Sizes()),
      }
      if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
  print(table(results))
  if options.write:
    PAGE.write_text(replace(PAGE.read_text(), "compiled", table(results)))
  return 0
