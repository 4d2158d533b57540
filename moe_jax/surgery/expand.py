"""Lifelong-MoE: layers get more experts for a new distribution of data.

Paper: Chen et al. 2023 (arXiv 2305.12281).
"""

from __future__ import annotations

import re

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.surgery.upcycle import FRESH
from moe_jax.surgery.weights import Weights, ffns, is_sparse, merged

SOURCES = ("copy", "fresh")
# The weights of a router whose last axis counts experts.
_ROUTER = re.compile(r"router(_noise|_threshold|_bias|_gate_scale)?")


def expand(
  old: Weights, new: Weights, *, source: str = "copy", seed: int = 0
) -> dict[str, np.ndarray]:
  """Returns the weights of a model whose layers have more experts.

  The first experts, and their columns of the router, are those of the old model, so that the new
  model computes what the old one does as long as no token chooses a new expert. With
  `optimizer.freeze_experts` they do not train.

  Args:
    old: The weights of a model with experts.
    new: Freshly drawn weights of a model with more experts.
    source: What the new experts begin as: "copy" of old experts, each drawn at random, or "fresh".
      Their columns of the router are always drawn anew. The paper does not say which it does.
    seed: The seed of the draws of copies.

  Raises:
    ConfigError: If the new model has not more experts, if its router is a network with a hidden
      layer, or if the models differ in more than the number of experts.
  """
  if source not in SOURCES:
    raise ConfigError("source", source, f"must be one of {', '.join(SOURCES)}")
  before, generator, made = dict(ffns(old)), np.random.default_rng(seed), {}
  for path, arrays in ffns(new):
    if not is_sparse(arrays) or path not in before or not is_sparse(before[path]):
      continue
    experts, grown = before[path]["up"].shape[0], arrays["up"].shape[0]
    if grown <= experts:
      raise ConfigError(
        "model.moe.num_experts",
        grown,
        f"{path} has {experts} experts already; set --config.model.moe.num_experts={2 * experts}",
      )
    if "router_hidden" in arrays or arrays["router"].shape[-1] < grown:
      raise ConfigError(
        "model.moe.gate_network",
        "tanh" if "router_hidden" in arrays else "product_keys",
        "all columns of this router change with the number of experts, so that old logits would, "
        "too; begin with a model with gate_network='linear'",
      )
    parents = generator.integers(experts, size=grown - experts)
    for name, array in arrays.items():
      earlier = before[path].get(name)
      if earlier is None or earlier.shape == array.shape:
        continue
      if _ROUTER.fullmatch(name):
        made[f"{path}/{name}"] = _inserted(earlier, array, experts, grown)
        continue
      added = earlier[parents] if source == "copy" else array[experts:].astype(earlier.dtype)
      made[f"{path}/{name}"] = np.concatenate([earlier, added])
    if (bias := old.get(f"{path.removesuffix('/ffn')}/balancing_bias")) is not None:
      name = f"{path.removesuffix('/ffn')}/balancing_bias"
      made[name] = _inserted(bias, new[name], experts, grown)
  if not made:
    raise ConfigError(
      "model.moe.num_experts", 0, "the old model has no layer with experts; upcycle it first"
    )
  return merged(old, new, made, FRESH)


def _inserted(earlier: np.ndarray, new: np.ndarray, experts: int, grown: int) -> np.ndarray:
  """Returns an array whose last axis counts experts, with those from `experts` to `grown` of `new`.

  What follows belongs to zero-computation experts, which are behind those with an FFN.
  """
  added = new[..., experts:grown].astype(earlier.dtype)
  return np.concatenate([earlier[..., :experts], added, earlier[..., experts:]], axis=-1)
