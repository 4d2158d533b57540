"""The ablations of ST-MoE at three scales, and the search for a base that is fragile at a desk.

An ablation changes one idea of the row that it is compared with. The ablations of stability (Tables
2 to 4) are compared with a baseline that has no router z-loss. The ablations of design (Tables 8,
18 and 21, appendix C) are made where training is stable, as in the paper. They are compared with
`top_2_1.25_2`, which is the baseline with a z-loss and with the further changes of its scale, or
with another row of design.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.common.sweep import Row

Changes = Mapping[str, Any]
BASELINE, REFERENCE = "baseline", "top_2_1.25_2"
# The number of seeds of a row, as in the paper: 6 for the baseline and 3 for all others.
SEEDS = {BASELINE: 6}
OTHERS = 3


@dataclasses.dataclass(frozen=True)
class Scale:
  """A size at which the ablations are made.

  Attributes:
    config: The config, as in `sweep.Row`.
    base: The keys that the baseline changes in the config.
    reference: The keys that the reference of the rows of design changes in the baseline.
    d_ff: The hidden width of the dense FFNs.
    expert_d_ff: The hidden width of the experts.
    together: Whether the seeds of a row are trained in one program, by `experiments.common.seeds`.
      Otherwise each seed is a run of its own.
    grown: The keys that the baseline changes to be stable with large router logits, for two more
      rows. {} leaves these rows out.
  """

  config: str
  base: Changes
  reference: Changes
  d_ff: int
  expert_d_ff: int
  together: bool = True
  grown: Changes = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ablation:
  """One row of the study.

  Attributes:
    words: What the row changes, in words.
    changes: The config keys whose values differ from those of `against`.
    against: The row that it is compared with, or "" for the baseline.
  """

  words: str
  changes: Changes
  against: str = BASELINE


# The recipe of T5 and ST-MoE: Adafactor without weight decay or global clipping, no z-loss, no
# dropout, and bfloat16 activations. Stability is judged by the loss of every step.
_PLAIN = {
  "model.dtype": "bfloat16",
  "model.moe.z_loss": 0.0,
  "model.moe.extra_ffn": False,
  "optimizer.name": "adafactor",
  "optimizer.schedule": "flat_rsqrt",
  "optimizer.weight_decay": 0.0,
  "optimizer.clip_norm": 0.0,
  "train.log_every": 1,
}
# Each stack has two layers, the second with experts. A sequence has 64 tokens, of which 15% are
# masked, and two sequences form a group. Each layer has its own table of relative biases, because
# these rows were trained so; ST-MoE's layers share one.
_SMALL = _PLAIN | {
  "model.relative_shared": False,
  "model.num_layers": 2,
  "model.moe.first": 1,
  "model.moe.every": 2,
  "model.moe.num_experts": 8,
  "model.moe.dispatcher.name": "einsum",
  "model.moe.group_rows": 2,
  "data.encoder_len": 64,
  "data.seq_len": 15,
  "optimizer.warmup_steps": 100,
  "train.batch_size": 16,
  "train.steps": 300,
  "train.eval_every": 300,
  "train.checkpoint_every": 300,
  "train.eval_batches": 16,
}
_RATE = "optimizer.learning_rate"
# A learning rate of 1.0 from the first step on makes the baseline fragile (see SEARCH). The rate
# decays to 2%, so that the seeds that survive have learnt enough to be told apart.
FRAGILE: Changes = {
  _RATE: 1.0,
  "optimizer.schedule": "cosine",
  "optimizer.warmup_steps": 0,
  "optimizer.final_fraction": 0.02,
}
# The rows of design have a z-loss and an extra FFN, as the released ST-MoE models.
_Z_LOSS: Changes = {"model.moe.z_loss": 0.001, "model.moe.extra_ffn": True}
# A stable run, long enough for a model of this size to use the text around the bytes that it fills
# in.
CALM: Changes = _Z_LOSS | {
  _RATE: 0.1,
  "optimizer.warmup_steps": 100,
  "train.steps": 1200,
  "train.eval_every": 1200,
}
# Changes with which router logits grow a hundredfold while nothing diverges (see SEARCH).
GROWN: Changes = {"optimizer.name": "adamw", _RATE: 0.1}
DESK = Scale("configs/st_moe.py:desk", _SMALL | FRAGILE, CALM, 192, 96, grown=GROWN)

LONGER: Changes = {
  "train.steps": 400,
  "train.eval_every": 400,
  "train.checkpoint_every": 400,
  "train.eval_batches": 32,
}
# Candidates for the baseline, tried with three seeds each: the keys that they change in `_SMALL`.
SEARCH: Mapping[str, Changes] = {
  **{f"rate_{rate:g}": LONGER | {_RATE: rate} for rate in (0.03, 0.5, 1.0)},
  **{f"cosine_{rate:g}": FRAGILE | {_RATE: rate} for rate in (1.0, 0.7, 0.5, 0.3)},
  **{
    f"unclipped_{rate:g}": FRAGILE | {_RATE: rate, "optimizer.update_clip": 100.0}
    for rate in (0.3, 0.1)
  },
  **{
    f"adamw_{rate:g}": FRAGILE | {_RATE: rate, "optimizer.name": "adamw"}
    for rate in (0.03, 0.06, 0.1, 0.3)
  },
  **{
    f"adamw_slow_{rate:g}": FRAGILE
    | {_RATE: rate, "optimizer.name": "adamw", "optimizer.b2": 0.999}
    for rate in (0.03, 0.06)
  },
  # These rows find the rates at which the z-loss, which is fatal at 1.0, does no harm.
  **{
    f"z_loss_{rate:g}": FRAGILE | {_RATE: rate, "model.moe.z_loss": 0.001}
    for rate in (0.5, 0.3, 0.1)
  },
}


def search() -> dict[str, Row]:
  """Returns the rows of the search by name."""
  return {name: Row(DESK.config, _SMALL | changes, OTHERS) for name, changes in SEARCH.items()}


def _no_geglu(scale: Scale) -> Changes:
  """Returns the keys of ReLU without a gate.

  The hidden layers are half as wide again, which takes the FLOPs of the gate's matrix.
  """
  return {
    "model.activation": "relu",
    "model.d_ff": 3 * scale.d_ff // 2,
    "model.moe.d_ff": 3 * scale.expert_d_ff // 2,
  }


_Z, _TRAIN, _EVAL = (
  "model.moe.z_loss",
  "model.moe.capacity_factor",
  "model.moe.eval_capacity_factor",
)
_ROUTER = "model.moe.router.st_moe"


def ablations(scale: Scale) -> dict[str, Ablation]:
  """Returns the ablations of a scale by name.

  The two numbers in a name are the capacity factors in training and at evaluation.
  """

  def capacity(train: float, evaluation: float, **router: Any) -> Changes:
    changed = {_TRAIN: train, _EVAL: evaluation} | {
      f"{_ROUTER}.{key}": value for key, value in router.items()
    }
    return {
      key: value
      for key, value in changed.items()
      if (key, value) not in ((_TRAIN, 1.25), (_EVAL, 2.0))
    }

  def design(words, changes, against=REFERENCE):
    return Ablation(words, changes, against)

  one = {"k": 1}
  rows = {
    BASELINE: Ablation("no z-loss", {}, ""),
    "no_geglu": Ablation("ReLU in place of GEGLU, same FLOPs", _no_geglu(scale)),
    "no_rms_scale": Ablation(
      "RMSNorm without scale parameters", {"model.norm": "rmsnorm_unscaled"}
    ),
    "input_jitter": Ablation("input jitter 0.01", {"model.moe.jitter": 0.01}),
    "dropout": Ablation("dropout 0.1", {"model.dropout": 0.1}),
    "update_clip": Ablation("update clipping at 0.1", {"optimizer.update_clip": 0.1}),
    **{
      f"z_loss_{weight}": Ablation(f"z-loss {weight}", {_Z: float(weight)})
      for weight in ("1e-4", "1e-3", "1e-2", "1e-1")
    },
    "z_loss_1e-3_sum": Ablation(
      "losses added up over layers", {"model.moe.layer_reduce": "sum"}, "z_loss_1e-3"
    ),
    "bfloat16_router": Ablation("bfloat16 router", {"model.moe.router_dtype": "bfloat16"}),
    REFERENCE: Ablation("top-2, capacity 1.25 / 2, z-loss, extra FFN", scale.reference),
    "top_1_0.75_0.75": design("top-1, capacity 0.75 / 0.75", capacity(0.75, 0.75, **one)),
    "top_1_0.75_2": design("top-1, capacity 0.75 / 2", capacity(0.75, 2.0, **one)),
    "top_1_1.25_2": design("top-1, capacity 1.25 / 2", capacity(1.25, 2.0, **one)),
    "top_2_0.75_0.75": design("top-2, capacity 0.75 / 0.75", capacity(0.75, 0.75)),
    "top_2_0.75_2": design("top-2, capacity 0.75 / 2", capacity(0.75, 2.0)),
    "top_2_2_3": design("top-2, capacity 2 / 3", capacity(2.0, 3.0)),
    "top_3_2_3": design("top-3, capacity 2 / 3", {f"{_ROUTER}.k": 3}, "top_2_2_3"),
    "threshold_0.05": design("threshold 0.05", {f"{_ROUTER}.threshold": 0.05}, "top_2_2_3"),
    "keep_all": design("all second choices kept", {f"{_ROUTER}.policy": "all"}, "top_2_2_3"),
    **{
      f"bpr_{name}": design(
        f"batch-prioritised, top-1, {words}",
        {"model.moe.encoder_priority": "gate"},
        f"top_1_{name}",
      )
      for name, words in (("0.75_0.75", "0.75 / 0.75"), ("0.75_2", "0.75 / 2"))
    },
    "no_extra_ffn": design("no extra FFN before the experts", {"model.moe.extra_ffn": False}),
    "additive_bias": design("additive FFN bias", {"model.ffn_bias": "additive"}),
    "multiplicative_bias": design("multiplicative FFN bias", {"model.ffn_bias": "multiplicative"}),
  }
  # One expert cannot be split over several devices.
  if "mesh.expert" not in scale.base:
    rows["one_expert"] = design(
      "dense twin: one expert, as wide as two",
      {"model.moe.num_experts": 1, f"{_ROUTER}.k": 1, "model.moe.d_ff": 2 * scale.expert_d_ff},
    )
  if scale.grown:
    rows |= {
      "adamw": Ablation("AdamW, rate 0.1", scale.grown),
      "adamw_z_loss_1e-3": Ablation("z-loss 1e-3", {_Z: 0.001}, "adamw"),
    }
  return rows


def is_design(name: str, known: Mapping[str, Ablation]) -> bool:
  """Returns whether a row belongs to the tables of design, whose models have the z-loss.

  These are the reference, and all rows that are compared with it or with one another.

  Args:
    name: The row.
    known: All ablations of the scale by name.
  """
  return name == REFERENCE or name != BASELINE and is_design(known[name].against, known)


def changes(name: str, known: Mapping[str, Ablation]) -> dict[str, Any]:
  """Returns all keys in which a row differs from the baseline."""
  ablation = known[name]
  return (changes(ablation.against, known) if ablation.against else {}) | dict(ablation.changes)


def seeds(name: str) -> int:
  """Returns the number of seeds of a row, as in the paper."""
  return SEEDS.get(name, OTHERS)


def rows(scale: Scale) -> dict[str, Row]:
  """Returns the rows to train, by name.

  There is one for each ablation, or, if the seeds of the scale are not trained together, one for
  each seed, with the seed's number at the end of its name.
  """
  known, made = ablations(scale), {}
  for name in known:
    keys = {**scale.base, **changes(name, known)}
    if scale.together:
      made[name] = Row(scale.config, keys, seeds(name))
    else:
      made |= {
        f"{name}_seed{seed}": Row(scale.config, keys | {"seed": seed})
        for seed in range(seeds(name))
      }
  return made


# About 100M activated parameters on one GPU, trained on the embedded corpus. The rate, warmed up
# over 1,000 steps, is that of the rows of design. `FRAGILE`'s rate of 1 made the base of the desk
# scale fail without learning anything, so that nothing could be said about what stabilises it.
GPU_STEPS = 4000
GPU = Scale(
  "configs/st_moe.py:desk",
  _PLAIN
  | {
    _RATE: 0.03,
    "optimizer.schedule": "cosine",
    "optimizer.final_fraction": 0.02,
    "model.d_model": 512,
    "model.d_ff": 1600,
    "model.num_heads": 8,
    "model.num_kv_heads": 8,
    "model.head_dim": 64,
    "model.num_layers": 12,
    "model.moe.num_experts": 16,
    "model.moe.d_ff": 800,
    "model.moe.group_rows": 4,
    "data.encoder_len": 512,
    "data.seq_len": 114,
    "optimizer.warmup_steps": 1000,
    "train.batch_size": 64,
    "train.steps": GPU_STEPS,
    "train.eval_every": 500,
    "train.checkpoint_every": 500,
    "train.eval_batches": 32,
  },
  _Z_LOSS,
  1600,
  800,
)
# Sparse T5-XL: stacks of 24 layers of width 2048, in which every fourth layer has 32 experts as
# wide as its FFN. The rows of design have the widths of ST-MoE-L. The rate is that of T5, 0.01,
# from the first step on, for 100,000 steps of 2^20 tokens as in Table 8. The mesh takes 32 x N
# chips.
PAPER = Scale(
  "configs/st_moe.py:l",
  {key: value for key, value in _PLAIN.items() if key.startswith("model.")}
  | {
    "model.d_model": 2048,
    "model.d_ff": 5120,
    "model.num_heads": 32,
    "model.num_kv_heads": 32,
    "model.moe.d_ff": 5120,
    "train.steps": 100_000,
    "train.log_every": 1,
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "mesh.expert": 32,
  },
  _Z_LOSS
  | {
    "model.d_model": 1024,
    "model.d_ff": 2816,
    "model.num_heads": 16,
    "model.num_kv_heads": 16,
    "model.moe.d_ff": 2816,
  },
  5120,
  5120,
  together=False,
)
SCALES: Mapping[str, Scale] = {"desk": DESK, "gpu": GPU, "paper": PAPER}
