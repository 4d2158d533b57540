"""Writes workdirs like those that runs leave behind, for the tests of the report."""

import json
import math
import pathlib

import numpy as np

SOURCES = ("embedded:prose", "embedded:code")
HOSTILE = "</script><script>alert(1)</script><!--\t&\"'é\x07\n"  # in tokens, names and the sample


def write_workdir(
  path: pathlib.Path,
  *,
  experts: int = 8,
  layers: int = 2,
  steps: int = 100,
  stop: int | None = None,
  nan_from: float = math.inf,
) -> pathlib.Path:
  """Writes the workdir of a run and returns its path.

  Args:
    path: The folder, which must not exist.
    experts: The number of experts per layer. 0 means a dense run.
    layers: The number of layers with experts. The model has as many dense layers, too.
    steps: The number of training steps.
    stop: The step after which the run was killed. It then has no results and no routing, and half a
      line at the end of its metrics. None means that the run finished.
    nan_from: The step from which on the loss and the load are not finite, which is reported as an
      event. Such values are null, as `training/metrics.py` writes them.
  """
  path.mkdir(parents=True)
  rng = np.random.default_rng(0)
  model = {
    "d_model": 16,
    "num_layers": 2 * layers,
    "moe": {
      "num_experts": experts,
      "first": 1,
      "every": 2,
      "d_ff": 32,
      "router": {"name": "top_k", "top_k": {"k": 2}},
      "capacity_factor": None,
    },
  }

  def write(name, value):
    return (path / name).write_text(json.dumps(value))

  write("config.json", {"seed": 7, "model": model, "train": {"steps": steps}, "note": HOSTILE})
  write(
    "meta.json",
    {
      "config": "configs/quickstart.py",
      "data": dict.fromkeys(SOURCES, "ab" * 32),
      "starts": [
        {
          "time": "2026-01-05T10:11:12+00:00",
          "python": "3.11.7",
          "packages": {"jax": "0.10.2", "flax": "0.12.8"},
          "commit": "0123456789abcdef",
          "devices": "1 x cpu",
          "command": "python -m moe_jax.train --config=x",
        }
      ],
    },
  )
  lines = []
  for n in range(2, (stop or steps) + 1, 2):
    loss = 1 + 4 * math.exp(-n / 20) if n < nan_from else None
    line = {
      "step": n,
      "kind": "train",
      "loss": loss,
      "cross_entropy": loss,
      "learning_rate": 1e-3 * min(1, n / 20),
      "grad_norm": loss,
      "tokens_per_second": 1e4,
    }
    if experts:
      load = rng.dirichlet(np.full(experts, 5.0), layers)

      def by_layer(value):
        return [value] * layers

      line |= {
        "balance": 1.1,
        "z": 0.5,
        "moe/load": load.tolist() if n < nan_from else [[None] * experts] * layers,
        "moe/drop_rate": by_layer(0.01),
        "moe/entropy": by_layer(1.5),
        "moe/max_violation": by_layer(0.4),
        "moe/logit_max": by_layer(3.0),
        "moe/dropped_tokens": by_layer(0.0),
      }
    lines.append(json.dumps(line))
    if n >= nan_from:
      lines.append(
        json.dumps(
          {"step": n, "kind": "event", "event": "nonfinite", "message": f"step {n} {HOSTILE}"}
        )
      )
    if n % 20 == 0:
      lines.append(
        json.dumps(
          {"step": n, "kind": "eval", "bits_per_byte": 2.0}
          | {f"bits_per_byte/{s}": 2 + math.exp(-n / 30) + i / 4 for i, s in enumerate(SOURCES)}
        )
      )
  (path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + ('{"step": 9' if stop else ""))
  if stop:
    return path
  rungs = {"unigram": 4.8, "bigram": 3.7, "trigram": 2.8, "4-gram": 2.4, "5-gram": 2.2, "lzma": 1.9}
  write(
    "results.json",
    {
      "config": "configs/quickstart.py",
      "seed": 7,
      "steps": steps,
      "bits_per_byte": dict.fromkeys(SOURCES, 2.0),
      "ladder": dict.fromkeys(SOURCES, rungs),
      "compare": {"label": "dense baseline", "bits_per_byte": {SOURCES[0]: 2.125}},
      "parameters": {"total": 1_234_567, "activated": 234_567},
      "flops_per_token": 4.5e6,
      "tokens": 8_192_000,
      "wall_seconds": 300.0,
      "python": "3.11.7",
      "versions": {"jax": "0.10.2"},
      "hardware": "1 x cpu, 2 cores",
      "sample": "sampled " + HOSTILE,
    },
  )
  if experts:
    pieces = [None, *HOSTILE, HOSTILE, *"plain text"]
    chosen = [[(i + layer) % (experts + 1) for i in range(len(pieces))] for layer in range(layers)]
    write(
      "routing.json",
      {
        "num_experts": experts,
        "layers": list(range(1, 2 * layers, 2)),
        "pages": [
          {"source": f"{source}<b>", "pieces": pieces, "experts": chosen} for source in SOURCES
        ],
      },
    )
  return path
