"""Reports of dry runs with round numbers, in the form in which `plan.plan` returns them."""

GIB = 2**30


def report(**changes):
  """Returns a report of a program that fits; `changes` replace its entries."""
  made = {
    "config": "configs/glam.py:64b_64e",
    "topology": "v4:8x8x16",
    "chip": "v4",
    "devices": 1024,
    "mesh": {"data": 1, "fsdp": 4, "expert": 64, "tensor": 4},
    "mode": "fast",
    "batch_size": 1024,
    "accumulate_steps": 1,
    "tokens": 2**20,
    "steps": 572_205,
    "versions": {"jax": "0.10.2"},
    "label": "compiler estimate, not measured",
    "fits": True,
    "expected": {
      "weights": 4.0 * GIB,
      "gradients": 4.0 * GIB,
      "optimizer state": 0.5 * GIB,
      "activations": 5.5 * GIB,
    },
    "memory": {
      "available": 32.0 * GIB,
      "peak": 16 * GIB,
      "arguments": 4 * GIB,
      "outputs": 4 * GIB,
      "aliased": 4 * GIB,
      "temporaries": 20 * GIB,
    },
    "seconds": {"trace": 7.0, "compile": 94.0, "cached": True, "resident_bytes": GIB},
    "flops": {"program": 8e14, "ideal": 4e14, "unknown_loops": 0},
    "roofline": {
      "matmuls": 3.0,
      "memory": 1.5,
      "networks": {"expert": 1.0, "data": float("nan")},
      "binds": "matmuls",
      "seconds": 3.0,
      "tokens_per_second": 349_525.0,
      "mfu": 0.5,
      "days": 19.9,
      "cycles": None,
    },
    "collectives": [
      {
        "kind": "all-to-all",
        "axes": "expert",
        "group_size": 64,
        "network": "ici",
        "count": 192.0,
        "bytes": 25.0 * GIB,
        "wire_bytes": 24.0 * GIB,
        "seconds": 1.0,
      },
      {
        "kind": "all-reduce",
        "axes": "data",
        "group_size": 2,
        "network": "dcn",
        "count": 1.0,
        "bytes": 1.0 * GIB,
        "wire_bytes": 1.0 * GIB,
        "seconds": float("nan"),
      },
    ],
    "exchange": {"formula": 23.6 * GIB, "program": 24.0 * GIB},
    "paper": {"seconds": 7.74, "machine": "1,024 TPU v4 chips", "source": "arXiv <2112.06905>"},
  }
  return made | changes


def too_large():
  """Returns a report of a program that does not fit."""
  keys = ("flops", "roofline", "collectives", "exchange", "paper", "seconds")
  made = report(
    fits=False,
    memory={"available": 32.0 * GIB, "needs": 40.0 * GIB},
    remedies=["--config.model.remat=full (about 9 GiB less)"],
  )
  return {key: value for key, value in made.items() if key not in keys}
