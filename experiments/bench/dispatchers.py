"""Times one MoE layer under each dispatcher beside a dense FFN of equal FLOPs."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np
from tqdm import tqdm

from experiments.common.command_line import check_counts, check_folder
from experiments.common.dots import dot_file
from moe_jax.commands.allocator import computes_on_cpu
from moe_jax.dispatch import DISPATCHERS
from moe_jax.dispatch.capacity import expert_capacity
from moe_jax.dispatch.grouped import plan_layout
from moe_jax.errors import choose
from moe_jax.experts import Experts, activate, is_gated
from moe_jax.hlo.flops import hlo_matmul_flops
from moe_jax.routing.plan import RoutingContext
from moe_jax.routing.top_k import top_k


class Shape(NamedTuple):
  """The sizes of a layer.

  Attributes:
    tokens: The number of tokens.
    d_model: The width of the model.
    d_ff: The hidden width of an expert.
    experts: E, the number of experts.
    k: K, the number of experts that a token visits.
    activation: The activation of the experts.
  """

  tokens: int
  d_model: int
  d_ff: int
  experts: int
  k: int
  activation: str


class Row(NamedTuple):
  """A dispatcher to time.

  Attributes:
    dispatcher: A key of `DISPATCHERS`.
    platform: The platform whose implementation is timed. None means that of the device.
    tokens_per_group: The size of a group. 0 means one group of all tokens.
    capacity_factor: The slots of all experts over the assignments. None means dropless.
  """

  dispatcher: str
  platform: str | None
  tokens_per_group: int
  capacity_factor: float | None


SHAPES = {
  "S1": Shape(4096, 512, 2048, 8, 2, "swiglu"),
  "S2": Shape(4096, 512, 1024, 32, 2, "swiglu"),
  "S3": Shape(8192, 256, 512, 64, 6, "swiglu"),
  "S4": Shape(4096, 512, 2048, 16, 1, "relu"),
}
# The rows are dropless where that is feasible. Otherwise they have 1.25 slots per assignment
# (S*K/E). einsum works in groups, because its cost is quadratic in their size.
ROWS = {
  "grouped": Row("grouped", None, 0, None),
  "scatter, capacity 1.25": Row("scatter", None, 0, 1.25),
  "einsum, capacity 1.25, groups of 128": Row("einsum", None, 128, 1.25),
}
SLOW = {"grouped by ragged_dot": Row("grouped", "tpu", 0, None)}


def random(key, *shape):
  """Returns a normal array, scaled by 1/sqrt(fan-in) if it is a stack of matrices."""
  return jax.random.normal(key, shape) / np.sqrt(shape[-2] if len(shape) > 2 else 1)


def workload(shape: Shape):
  """Returns tokens, router logits and experts.

  The experts are slightly uneven: their loads differ by a factor of about 3.
  """
  keys = jax.random.split(jax.random.key(0), 6)
  t, d, f, e = shape[:4]
  gate = random(keys[2], e, d, f) if is_gated(shape.activation) else None
  experts = Experts(random(keys[0], e, d, f), random(keys[1], e, f, d), gate, shape.activation)
  return random(keys[3], t, d), random(keys[4], t, e) + 0.3 * random(keys[5], 1, e), experts


def dense(shape: Shape, experts: Experts):
  """Returns the programs of a dense FFN on tokens * k rows, and the trips of its loops.

  It has no loops.
  """
  w = {name: leaf[0] for name, leaf in experts.weights.items()}
  rows = random(jax.random.key(1), shape.tokens * shape.k, shape.d_model)

  def ffn(rows, w):
    return activate(shape.activation, {n: rows @ w[n] for n in w if n != "down"}) @ w["down"]

  return compiled(ffn, rows, w), {}


def layer(shape: Shape, row: Row, x, logits, experts: Experts):
  """Returns the programs of a dispatcher on a given plan, and the trips of their loops.

  The backward pass is by x, gates and weights.
  """
  per_group = row.tokens_per_group or shape.tokens

  def group(array):
    return array.reshape(shape.tokens // per_group, per_group, -1)

  def route(logits):
    return top_k(logits, RoutingContext(), k=shape.k, gate_norm="top_k" if shape.k > 1 else "none")

  plan = jax.jit(jax.vmap(route))(group(logits))
  slots = expert_capacity(
    per_group, shape.experts, per_group * shape.k, row.capacity_factor, "assignments", 1
  )
  where = row.platform or next(iter(x.devices())).platform

  def apply(x, gate, experts, plan):
    return DISPATCHERS[row.dispatcher](plan.replace(gate=gate), x, experts, slots, where)

  return compiled(apply, group(x), plan.gate, experts, plan, constants=1), plan_layout(
    plan, slots
  ).trips()


def compiled(function, *args, constants=0):
  """Compiles the forward pass, and the forward and backward passes together.

  Args:
    function: The function to compile.
    *args: Its arguments.
    constants: The number of arguments, from the end, that get no gradient.

  Returns:
    {"forward", "backward"} -> the optimised program as text, and a thunk that runs it.
  """
  split = len(args) - constants

  def backward(cotangent, *args):
    value, pull = jax.vjp(lambda *a: function(*a, *args[split:]), *args[:split])
    # Gradients alone would let XLA skip the last product of the dense FFN, hence the value.
    return value, pull(cotangent)

  cotangent = jax.random.normal(jax.random.key(2), jax.eval_shape(function, *args).shape)
  both = {"forward": (function, args), "backward": (backward, (cotangent, *args))}
  programs = {name: (jax.jit(f).lower(*a).compile(), a) for name, (f, a) in both.items()}
  return {
    name: (program.as_text(), functools.partial(program, *a))
    for name, (program, a) in programs.items()
  }


def measure(name: str, shape: Shape, rows: dict[str, Row], repeats: int, progress):
  """Times all rows in interleaved rounds and returns their medians.

  A ratio is the median over the rounds of a row's time over the dense FFN's in the same round.
  """
  x, logits, experts = workload(shape)
  makers = {"dense FFN": lambda: dense(shape, experts)}
  makers |= {row: functools.partial(layer, shape, rows[row], x, logits, experts) for row in rows}
  programs = {}
  matrices = 2 + is_gated(shape.activation)
  ideal = 2.0 * shape.tokens * shape.k * shape.d_model * shape.d_ff * matrices
  results = {row: {} for row in makers}
  for row, make in makers.items():
    progress(f"{name}: compiling {row}")
    both, trips = make()
    for part, (text, run) in both.items():
      programs[row, part] = run
      scale = ideal if part == "forward" else 3 * ideal
      results[row][f"{part}_flops_ratio"] = hlo_matmul_flops(text, trips) / scale
  times = {key: [] for key in programs}
  for round_number in range(repeats + 1):
    for (row, part), run in programs.items():
      progress(f"{name}: {part} of {row}")
      start = time.perf_counter()
      jax.block_until_ready(run())
      if round_number:  # the first round warms up
        times[row, part].append(1e3 * (time.perf_counter() - start))
  for (row, part), ms in times.items():
    results[row] |= {
      f"{part}_ms": float(np.median(ms)),
      f"{part}_ratio": float(np.median(np.array(ms) / times["dense FFN", part])),
    }
  return results


def table(name: str, shape: Shape, results) -> str:
  """Returns the results of a shape as text."""
  head = f"{name}: " + ", ".join(f"{field}={value}" for field, value in shape._asdict().items())
  lines = [
    head,
    f"{'':38}{'forward':>10}{'ratio':>7}{'FLOPs':>7}{'fwd+bwd':>11}{'ratio':>7}{'FLOPs':>7}",
  ]
  for row, r in results.items():
    lines.append(
      f"{row:38}"
      + "".join(
        f"{r[f'{part}_ms']:{7 + wide}.1f} "
        f"ms{r[f'{part}_ratio']:7.2f}{r[f'{part}_flops_ratio']:7.2f}"
        for part, wide in (("forward", 0), ("backward", 1))
      )
    )
  return "\n".join(lines)


def figure(report: Mapping[str, Any]) -> str:
  """Returns an SVG of the time of each dispatcher relative to the dense FFN.

  Args:
    report: The content of the file of --out.
  """
  lines = {
    f"{name}, {words}": {
      row: values[f"{part}_ratio"] for row, values in shape["rows"].items() if row != "dense FFN"
    }
    for name, shape in report["shapes"].items()
    for part, words in (("forward", "forward"), ("backward", "fwd+bwd"))
  }
  return dot_file(
    "Time of a layer with experts relative to a dense FFN of the same activated FLOPs",
    lines,
    f"ratio of times, {report['environment']['cpu']}; 1 is the dense FFN",
    mark=1.0,
    bold=("grouped",),
  )


def environment():
  """Returns what may influence the times: devices, versions, load and flags."""
  cpu = (
    [
      line.split(":")[1].strip()
      for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
      if line.startswith("model name")
    ]
    if sys.platform == "linux"
    else [platform.processor()]
  )
  return {
    "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
    "cpu": f"{len(cpu)} x {cpu[0]}",
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "python": platform.python_version(),
    "system": platform.platform(),
    "load_average": os.getloadavg(),
    "keeps_freed_memory": computes_on_cpu(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


class Progress(tqdm):
  """A progress bar that says what is being done."""

  def __init__(self, steps: int):
    super().__init__(total=steps, unit="run", leave=False)

  def __call__(self, what: str):
    """Says what is being done, and counts it."""
    self.set_description_str(what, refresh=False)
    self.update()


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument(
    "--shapes", default=",".join(SHAPES), help=f"comma-separated, of {', '.join(SHAPES)}"
  )
  parser.add_argument(
    "--repeats", type=int, default=11, help="timed rounds; medians are shown (%(default)s)"
  )
  parser.add_argument(
    "--out", type=pathlib.Path, help="JSON file for the results, beside which a figure is written"
  )
  parser.add_argument(
    "--slow", action="store_true", help="also XLA's ragged_dot, which is E times the FLOPs on a CPU"
  )


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  names = options.shapes.split(",")
  for name in names:
    choose("shapes", name, SHAPES)
  check_counts(options, repeats=1)
  check_folder("out", options.out)
  rows = ROWS | (SLOW if options.slow else {})
  progress = Progress(len(names) * (len(rows) + 1) * (1 + 2 * (options.repeats + 1)))
  report = {"environment": environment(), "repeats": options.repeats, "shapes": {}}
  print(
    "Ratios are to the dense FFN's time, and to the ideal FLOPs: those of the matmuls of tokens * "
    "k rows.\n"
  )
  for name in names:
    results = measure(name, SHAPES[name], rows, options.repeats, progress)
    progress.clear()
    print(table(name, SHAPES[name], results) + "\n", flush=True)
    report["shapes"][name] = {"shape": SHAPES[name]._asdict(), "rows": results}
  report["environment"]["load_average_after"] = os.getloadavg()
  if options.out:
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".svg").write_text(figure(report))
  return 0
