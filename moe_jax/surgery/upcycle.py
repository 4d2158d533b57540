"""Sparse upcycling: the FFNs of a dense model become the first experts of a sparse one."""

from __future__ import annotations

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.surgery.weights import MATRICES, Weights, converted, merged

# The weights of a layer with experts that a dense layer does not have. They stay as drawn.
FRESH = (r"/ffn/router", r"/ffn/constant_", r"/ffn/shared_gate$", r"/balancing_bias$")
# The axis of an expert's matrix along which its hidden units lie.
HIDDEN_AXIS = {"up": 1, "gate": 1, "down": 0}


def upcycle(
  old: Weights, new: Weights, *, drop: float = 0.0, seed: int = 0
) -> dict[str, np.ndarray]:
  """Returns the weights of a sparse model whose experts are copies of a dense model's FFNs.

  If an expert is as wide as the dense FFN, each expert is a copy of it (Komatsuzaki et al. 2022,
  arXiv 2212.05055). With gates that sum to 1 the new model then computes what the old one does.

  If the dense FFN is G times as wide, expert e holds the hidden units of shard e % G ("virtual
  group initialisation", He et al. 2024, arXiv 2410.07524), and the G experts of a group share one
  column of the router, so that a token that visits K = G T experts visits whole groups. With gates
  that sum to 1 and `model.moe.routed_scale` = G the new model computes what the old one does.

  The router and a gate of shared experts are drawn anew. All other weights are kept, and shared
  experts get the FFN, too, as far as they are wide: the first hidden units.

  Args:
    old: The weights of the dense model.
    new: Freshly drawn weights of the sparse model.
    drop: The share of the hidden units of each expert that are drawn anew, in [0, 1), from a normal
      distribution with the mean and the standard deviation of the weights that they replace
      (Drop-Upcycling, Nakamura et al. 2025, arXiv 2502.19261, Sec. 3.2; its best value is 0.5).
      Each expert draws its own units. The new model then no longer computes what the old one does.
    seed: The seed of these draws.

  Raises:
    ConfigError: If the width of an expert does not divide that of the FFN, if the number of experts
      is no multiple of the number of shards, or if the models differ in more than experts.
  """
  if not 0 <= drop < 1:
    raise ConfigError("drop", drop, "must be a share of hidden units, at least 0 and below 1")
  generator, made = np.random.default_rng(seed), {}
  for path, dense, sparse in converted(old, new):
    experts, _, width = sparse["up"].shape
    shards = shards_of(path, dense["up"].shape[1], experts, width)
    copies = {name: _copies(name, dense[name], experts, shards) for name in dense}
    if drop:
      _redraw(copies, drop, generator)
    made |= {f"{path}/{name}": copy for name, copy in copies.items()}
    made |= _router(path, sparse, shards)
    made |= _shared(path, dense, new)
  return merged(old, new, made, FRESH)


def shards_of(path: str, hidden: int, experts: int, width: int) -> int:
  """Returns the number of shards into which a dense FFN is cut.

  Args:
    path: The path of the FFN, for messages.
    hidden: The number of its hidden units.
    experts: The number of experts.
    width: The number of hidden units of an expert.

  Raises:
    ConfigError: If the width does not divide `hidden`, or the shards do not divide the experts.
  """
  if hidden % width:
    raise ConfigError(
      "model.moe.d_ff",
      width,
      f"must divide the {hidden} hidden units of {path}; set --config.model.moe.d_ff={hidden}",
    )
  shards = hidden // width
  if experts % shards:
    raise ConfigError(
      "model.moe.num_experts",
      experts,
      f"must be a multiple of the {shards} shards of {path}; set "
      f"--config.model.moe.num_experts={shards * -(-experts // shards)}",
    )
  return shards


def _copies(name: str, matrix: np.ndarray, experts: int, shards: int) -> np.ndarray:
  """Returns one matrix for each expert, [E, ...]: that of shard e % `shards`."""
  parts = np.split(matrix, shards, axis=HIDDEN_AXIS[name])
  return np.stack([parts[e % shards] for e in range(experts)])


def _redraw(copies: dict[str, np.ndarray], drop: float, generator: np.random.Generator) -> None:
  """Draws a share of each expert's hidden units anew, in place."""
  experts, _, width = copies["up"].shape
  for e in range(experts):
    chosen = generator.choice(width, round(drop * width), replace=False)
    for name in MATRICES:
      if name in copies and len(chosen):
        units = np.moveaxis(copies[name][e], HIDDEN_AXIS[name], 0)
        kept = units[chosen].astype(np.float64)
        units[chosen] = generator.normal(kept.mean(), kept.std(), kept.shape)


def _router(path: str, sparse: dict[str, np.ndarray], shards: int) -> dict[str, np.ndarray]:
  """Returns the drawn weights of the router, with one column for all experts of a group."""
  found, experts = {}, sparse["up"].shape[0]
  columns = sparse["router"].shape[-1] if "router" in sparse else experts
  for name, array in sparse.items():
    # Columns behind those of the experts with an FFN belong to zero-computation experts.
    if shards > 1 and name.startswith("router") and array.shape[-1] == columns:
      same = np.repeat(array[..., :experts:shards], shards, axis=-1)
      found[f"{path}/{name}"] = np.concatenate([same, array[..., experts:]], axis=-1)
  return found


def _shared(path: str, dense: dict[str, np.ndarray], new: Weights) -> dict[str, np.ndarray]:
  """Returns the weights of a layer's shared experts: the first hidden units of the FFN."""
  found = {}
  for name, matrix in dense.items():
    target = new.get(f"{path}/shared/{name}")
    if target is None:
      continue
    units = np.moveaxis(matrix, HIDDEN_AXIS[name], 0)
    width = target.shape[HIDDEN_AXIS[name]]
    if width > len(units):
      raise ConfigError(
        "model.moe.num_shared_experts",
        width,
        f"shared experts of {width} hidden units are wider than the {len(units)} of {path}; take "
        "fewer of them",
      )
    found[f"{path}/shared/{name}"] = np.moveaxis(units[:width], 0, HIDDEN_AXIS[name])
  return found
