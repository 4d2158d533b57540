"""Times what routing costs: all of a MoE layer's forward pass except the experts' matmuls.

For each router at shape S1, the layer is timed from x to y: router logits, plan, sorting,
gathering, experts and combining, with the dispatcher `grouped` and without drops. It is timed again
with experts that hand their rows on unchanged, and the ratio of the two is the share of routing.
Slicing an expert's weights out of the stack counts as a part of its matmuls.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from experiments.bench.dispatchers import SHAPES, Progress, dense, environment, random, workload
from experiments.common.command_line import check_counts, check_folder
from moe_jax.dispatch import DISPATCHERS
from moe_jax.errors import choose
from moe_jax.routing import ROUTERS, RoutingContext

GROUPS = 2  # groups of experts of the router hierarchical
# The options of each router: two experts a token, as in shape S1, if the router has such an option.
# Routers that give tokens different numbers of experts have room for four. All causal routers are
# here, and those others whose cost is of interest.
OPTIONS = {
  "top_k": {"k": 2},
  "expert_choice": {"capacity_factor": 2.0},
  "sigmoid_bias": {"k": 2},
  "gshard": {},
  "st_moe": {"k": 2},
  "device_limited": {"k": 2, "groups": 4, "kept_groups": 2},
  "no_token_left_behind": {},
  "sinkhorn": {"k": 2},
  "base": {},
  "capped_expert_choice": {},
  "scored_top_k": {"k": 2, "score": "sqrt_softplus", "norm_eps": 1e-20},
  "noisy_top_k": {"k": 2},
  "hierarchical": {"groups": GROUPS, "primary_k": 1, "k": 2},
  "adaptive_mixture": {},
  "hash_layer": {},
  "hash_top_k": {"k": 2},
  "random_choice": {"k": 2},
  "relu": {"k": 2, "most": 4},
  "top_p": {"k": 2, "most": 4},
  "expert_threshold": {"k": 2, "most": 4},
  "token_rounding": {"k": 2, "tile": 64},
  "sparse_mixer": {"k": 2},
}
# Routers that draw random numbers for every token.
DRAWING = ("noisy_top_k", "hierarchical", "random_choice", "sparse_mixer")


@struct.dataclass
class Copies:
  """Experts that hand their rows on, so that only routing and bookkeeping remain of a layer."""

  weights: jax.Array  # [E, 1]

  @property
  def num_experts(self):
    """E."""
    return self.weights.shape[0]

  @property
  def axes(self):
    """The logical axes of the weights."""
    return ("expert", None)

  def buffers(self, x):
    """Returns the rows of dispatchers with slots, unchanged."""
    return x

  def hidden(self, w, rows):
    """Returns the rows in place of hidden units."""
    return rows

  def output(self, w, pre):
    """Returns the rows in place of outputs."""
    return pre

  def ragged(self, rows, group_sizes):
    """Returns the rows of dropless dispatchers, unchanged."""
    return rows


def context(name, x, experts):
  """Returns the context of a router in training.

  What the layer learns beside the logits is constant here, so that its matmuls do not count.

  Args:
    name: The name of the router.
    x: The tokens.
    experts: The number of experts.
  """
  tokens, learned = x.shape[0], ROUTERS[name].learned
  fields = {
    "noise_std": jnp.ones((tokens, experts)),
    "primary": jnp.zeros((tokens, GROUPS)),
    "primary_noise_std": jnp.ones((tokens, GROUPS)),
  }
  # A key that depends on the tokens keeps XLA from drawing the numbers when it compiles.
  key = jax.random.key(x[0, 0].astype(jnp.int32)) if name in DRAWING else None
  return RoutingContext(
    key=key, token_ids=jnp.arange(tokens), train=True, **{field: fields[field] for field in learned}
  )


def layer(name, x, weight, experts, platform):
  """Returns y [1, T, D] of a layer with the router `name`, with all tokens in one group."""
  logits = jnp.einsum("sd,de->se", x, weight, precision=jax.lax.Precision.HIGHEST)
  route = functools.partial(ROUTERS[name].route, **OPTIONS[name])
  plan = route(logits, context(name, x, logits.shape[-1]))
  return DISPATCHERS["grouped"](
    jax.tree.map(lambda a: a[None], plan), x[None], experts, None, platform
  )


def measure(names, shape, repeats, progress):
  """Times all routers in interleaved rounds and returns their medians.

  Returns:
    Router -> {"layer_ms", "bookkeeping_ms", "share", "ratio"}.
  """
  x, logits, experts = workload(shape)
  weight = random(jax.random.key(9), shape.d_model, shape.experts)
  platform = next(iter(x.devices())).platform
  programs = {"dense FFN": dense(shape, experts)[0]["forward"][1]}
  for name in names:
    for part, inner in (("layer", experts), ("bookkeeping", Copies(jnp.zeros((shape.experts, 1))))):
      progress(f"compiling {part} of {name}")
      f = jax.jit(lambda x, w, inner, name=name: layer(name, x, w, inner, platform))
      programs[name, part] = functools.partial(
        f.lower(x, weight, inner).compile(), x, weight, inner
      )
  times = {key: [] for key in programs}
  for round_number in range(repeats + 1):
    for key, program in programs.items():
      progress(f"timing {key}")
      start = time.perf_counter()
      jax.block_until_ready(program())
      if round_number:  # the first round warms up
        times[key].append(1e3 * (time.perf_counter() - start))
  times = {key: np.array(values) for key, values in times.items()}

  def median(values):
    return float(np.median(values))

  return {
    name: {
      "layer_ms": median(times[name, "layer"]),
      "bookkeeping_ms": median(times[name, "bookkeeping"]),
      "share": median(times[name, "bookkeeping"] / times[name, "layer"]),
      "ratio": median(times[name, "layer"] / times["dense FFN"]),
    }
    for name in names
  }


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument(
    "--routers", default=",".join(OPTIONS), help=f"comma-separated, of {', '.join(OPTIONS)}"
  )
  parser.add_argument("--shape", default="S1", choices=SHAPES)
  parser.add_argument(
    "--repeats", type=int, default=11, help="timed rounds; medians are shown (%(default)s)"
  )
  parser.add_argument("--out", type=pathlib.Path, help="JSON file for the results")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  names = options.routers.split(",")
  for name in names:
    choose("routers", name, OPTIONS)
  check_counts(options, repeats=1)
  check_folder("out", options.out)
  progress = Progress(2 * len(names) + (2 * len(names) + 1) * (options.repeats + 1))
  before = environment()
  results = measure(names, SHAPES[options.shape], options.repeats, progress)
  progress.clear()
  print(
    f"{options.shape}, forward: router, plan, sorting, gathering and combining, as a share of the "
    "layer's time; the layer's time over a dense FFN's\n"
  )
  print(f"{'':24}{'layer':>11}{'bookkeeping':>13}{'share':>8}{'layer/dense':>13}")
  for name, r in results.items():
    print(
      f"{name:24}{r['layer_ms']:8.1f} ms{r['bookkeeping_ms']:10.1f} ms{100 * r['share']:6.1f} "
      f"%{r['ratio']:13.2f}"
    )
  if options.out:
    report = {
      "environment": before,
      "shape": options.shape,
      "repeats": options.repeats,
      "routers": results,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
  return 0
