"""LLaMA-MoE's constructions: the hidden units of a dense FFN are divided among experts.

Paper: Zhu et al. 2024 (arXiv 2406.16554), Sec. 3.1; the names are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from moe_jax.errors import ConfigError
from moe_jax.surgery.balanced_clusters import balanced_clusters
from moe_jax.surgery.upcycle import FRESH, HIDDEN_AXIS
from moe_jax.surgery.weights import Weights, converted, merged

METHODS = ("random", "clustering", "inner", "inter")
# The path of an FFN -> the importance of its hidden units for each cluster of texts, [C, F].
Importance = Mapping[str, Float[np.ndarray, "C F"]]


def partition(
  old: Weights, new: Weights, *, method: str, importance: Importance | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
  """Returns the weights of a sparse model whose experts hold parts of a dense model's FFNs.

  The router is drawn anew; all other weights are kept. An FFN is the sum over its hidden units, so
  that experts which hold each unit once add up to it. With gates that sum to 1 and all N experts
  chosen with equal gates, the new model computes what the old one does if `routed_scale` is N. The
  paper's factor for k of N experts is N / k.

  Methods:
    random      Independent-Random: units are shuffled and dealt out in equal numbers.
    clustering  Independent-Clustering: balanced k-means of the columns of `up`, each divided by its
                length.
    inner       Sharing-Inner: each expert takes the units that are most important for its cluster
                of texts. A unit may be in several experts, or in none.
    inter       Sharing-Inter: the units that are important for the most clusters become the shared
                experts, which every token visits, and the others are dealt out by shuffling.

  Args:
    old: The weights of the dense model.
    new: Freshly drawn weights of the sparse model. It has shared experts exactly with "inter".
    method: One of `METHODS`.
    importance: The importance of the units, for the methods "inner" and "inter"; see
      `importance.importance`. "inner" needs as many clusters as there are experts.
    seed: The seed of shuffling and of k-means.

  Raises:
    ConfigError: If the widths do not add up to the FFN's, if the method needs an importance or
      shared experts that are not there, or if the models differ in more than experts.
  """
  generator, made = np.random.default_rng(seed), {}
  for path, dense, sparse in converted(old, new):
    experts, _, width = sparse["up"].shape
    shared = new.get(f"{path}/shared/up")
    shared_width = 0 if shared is None else shared.shape[1]
    _check(path, method, dense["up"].shape[1], experts, width, shared_width)
    weights_of_units = _importance(path, method, importance, experts, dense["up"].shape[1])
    units, common = _divide(
      method, dense["up"], experts, width, shared_width, weights_of_units, generator
    )
    for name, matrix in dense.items():
      rows = np.moveaxis(matrix, HIDDEN_AXIS[name], 0)
      made[f"{path}/{name}"] = np.moveaxis(rows[units], 1, 1 + HIDDEN_AXIS[name])
      if shared_width:
        made[f"{path}/shared/{name}"] = np.moveaxis(rows[common], 0, HIDDEN_AXIS[name])
  return merged(old, new, made, FRESH)


def _check(
  path: str, method: str, hidden: int, experts: int, width: int, shared_width: int
) -> None:
  """Raises ConfigError unless the method can divide `hidden` units in this way."""
  if method not in METHODS:
    raise ConfigError("method", method, f"must be one of {', '.join(METHODS)}")
  if (method == "inter") != bool(shared_width):
    wanted = (
      "needs shared experts for the units that are important everywhere; set "
      "--config.model.moe.num_shared_experts=1"
      if method == "inter"
      else "has no units for shared experts; set --config.model.moe.num_shared_experts=0, or take "
      "--method=inter"
    )
    raise ConfigError("method", method, wanted)
  rest = hidden - shared_width
  if method != "inner" and experts * width != rest:
    fitting = (
      f"--config.model.moe.d_ff={rest // experts}"
      if rest > 0 and rest % experts == 0
      else "another --config.model.moe.num_experts"
    )
    raise ConfigError(
      "model.moe.d_ff",
      width,
      f"{experts} experts of this width hold {experts * width} hidden units, and {path} has "
      f"{rest} to divide; set {fitting}",
    )
  if width > hidden:
    raise ConfigError(
      "model.moe.d_ff", width, f"an expert cannot be wider than the {hidden} units of {path}"
    )


def _importance(
  path: str, method: str, importance: Importance | None, experts: int, hidden: int
) -> Float[np.ndarray, "C F"] | None:
  """Returns the importance of an FFN's units, or None for the methods that read none."""
  if method in ("random", "clustering"):
    return None
  found = None if importance is None else importance.get(path)
  if found is None or found.shape[-1] != hidden:
    raise ConfigError(
      "importance", path, f"--method={method} needs the importance of its {hidden} hidden units"
    )
  if method == "inner" and len(found) != experts:
    raise ConfigError(
      "importance",
      len(found),
      f"--method=inner needs one cluster of texts for each of the {experts} experts",
    )
  return found


def _divide(
  method: str,
  up: Float[np.ndarray, "D F"],
  experts: int,
  width: int,
  shared: int,
  importance: Float[np.ndarray, "C F"] | None,
  generator: np.random.Generator,
) -> tuple[Int[np.ndarray, "E W"], Int[np.ndarray, "S"]]:
  """Returns the hidden units of each expert, and those of the shared experts."""
  everything = np.arange(up.shape[1])
  nobody = everything[:0]
  if method == "clustering":
    columns = up.T.astype(np.float64)
    length = np.linalg.norm(columns, axis=1, keepdims=True)
    label = balanced_clusters(columns / np.maximum(length, 1e-30), experts, generator)
    return np.stack([np.flatnonzero(label == e) for e in range(experts)]), nobody
  if method == "inner":
    assert importance is not None
    # Ties go to the unit of the lower index.
    best = np.argsort(-importance, axis=1, kind="stable")[:, :width]
    return np.sort(best, axis=1), nobody
  common = nobody
  if method == "inter":
    assert importance is not None
    # A unit is important for a cluster if it is among the `shared` units that matter most for it.
    # The sum of the shares decides between units that are important for equally many clusters.
    order = np.argsort(-importance, axis=1, kind="stable")[:, :shared]
    votes = np.bincount(order.ravel(), minlength=len(everything))
    total = np.maximum(importance.sum(axis=1, keepdims=True), 1e-30)
    share = (importance / total).sum(axis=0)
    common = np.sort(np.lexsort((everything, -share, -votes))[:shared])
  rest = generator.permutation(np.setdiff1d(everything, common))
  return np.sort(rest.reshape(experts, width), axis=1), common
