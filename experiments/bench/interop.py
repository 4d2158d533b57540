"""Measures the memory and the time of importing and exporting a published checkpoint.

  python -m experiments bench interop [--gigabytes=2] [--workdir=DIR]

It writes a checkpoint of random bfloat16 weights in the shape of a smaller Mixtral, as four files,
and then runs each case in a process of its own: the weights read onto one device, the weights read
onto a mesh of 2 (expert) x 4 (tensor) CPU devices, a workdir made of the checkpoint, and the
checkpoint made of the workdir. For each it prints the peak of the resident memory, from which the
memory before the first tensor (Python and JAX) is subtracted, as a multiple of the weights' bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import ml_dtypes
import numpy as np

from experiments.common.command_line import check_counts
from moe_jax.interop import from_hugging_face, hugging_face, to_hugging_face
from moe_jax.interop.families import mixtral
from moe_jax.interop.tensors import Writer
from moe_jax.interop.weights import Bridge
from moe_jax.sharding import make_mesh

CASES = ("one device", "mesh of 8", "workdir", "published")
FILES = 4
# A layer of these widths has 0.18 GB of weights.
SETTINGS = {
  "model_type": "mixtral",
  "architectures": ["MixtralForCausalLM"],
  "hidden_act": "silu",
  "hidden_size": 1024,
  "intermediate_size": 3584,
  "num_attention_heads": 16,
  "num_key_value_heads": 8,
  "num_local_experts": 8,
  "num_experts_per_tok": 2,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e6,
  "vocab_size": 32_000,
  "torch_dtype": "bfloat16",
}
LAYER_GIGABYTES = 0.182


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("--gigabytes", type=int, default=2)
  parser.add_argument("--workdir", default="", help="where the files go; a temporary folder if ''")
  parser.add_argument("--case", choices=CASES, help="one case alone, of files that are there")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  check_counts(options, gigabytes=1)
  if options.case:
    print(json.dumps(case(options.case, pathlib.Path(options.workdir))))
    return 0
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(options.workdir or temporary)
    total = write(folder / "checkpoint", options.gigabytes)
    print(f"{total / 1e9:.2f} GB of weights in {FILES} files")
    for name in CASES:
      command = [sys.executable, "-m", "experiments", "bench", "interop", f"--workdir={folder}"]
      environment = os.environ | {"JAX_PLATFORMS": "cpu"}
      if name == "mesh of 8":
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
      done = subprocess.run(
        [*command, f"--case={name}"], env=environment, capture_output=True, text=True, check=True
      )
      found = json.loads(done.stdout.splitlines()[-1])
      print(
        f"{name:>10}: {found['peak'] / 1e9:.2f} GB above {found['before'] / 1e9:.2f} GB, "
        f"{found['peak'] / total:.2f} of the weights, {found['seconds']:.0f} s"
        + (f", {found['device'] / 1e9:.2f} GB a device" if "device" in found else ""),
        flush=True,
      )
  return 0


def write(folder: pathlib.Path, gigabytes: int) -> int:
  """Writes the checkpoint, one tensor at a time, and returns the bytes of its weights."""
  folder.mkdir(parents=True)
  settings = SETTINGS | {"num_hidden_layers": round(gigabytes / LAYER_GIGABYTES)}
  (folder / "config.json").write_text(json.dumps(settings))
  published = hugging_face.read(folder)
  bridge = Bridge(mixtral, hugging_face.config_of(published), make_mesh({"data": 1}))
  shapes = {binding.theirs: bridge.their_shape(binding) for binding in bridge.bound}
  total = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
  draw, writer = np.random.default_rng(0), Writer(folder, total // FILES + 10**6)
  for name, shape in shapes.items():
    writer.add(name, draw.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16))
  writer.close()
  return total


def case(name: str, folder: pathlib.Path) -> dict[str, Any]:
  """Runs one case in this process, and returns its figures."""
  import jax

  jax.block_until_ready(jax.numpy.zeros(8) + 1)
  before, begun, found = resident("VmRSS"), time.monotonic(), {}
  if name in CASES[:2]:
    published = hugging_face.read(folder / "checkpoint")
    mesh = make_mesh({"data": 1} if name == CASES[0] else {"expert": 2, "tensor": 4})
    variables = hugging_face.load(published, hugging_face.config_of(published), mesh)
    held: dict[int, int] = {}
    for leaf in jax.tree.leaves(variables):
      for shard in leaf.addressable_shards:
        held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    found["device"] = max(held.values())
  elif name == "workdir":
    from_hugging_face(folder / "checkpoint", folder / "run")
  else:
    to_hugging_face(folder / "run", folder / "again")
  return found | {
    "before": before,
    "peak": resident("VmHWM") - before,
    "seconds": time.monotonic() - begun,
  }


def resident(field: str) -> int:
  """Returns bytes of this process's resident memory: VmRSS is now, VmHWM the highest so far."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
