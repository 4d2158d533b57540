"""The importance of a dense model's hidden units for clusters of texts (LLaMA-MoE)."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moe_jax import assembly, data, sharding
from moe_jax.data.options import DataOptions
from moe_jax.errors import ConfigError
from moe_jax.interop import unrolled
from moe_jax.options import Config
from moe_jax.run.load import LoadedRun
from moe_jax.surgery.balanced_clusters import balanced_clusters
from moe_jax.surgery.weights import Weights
from moe_jax.training.step import apply

_BIAS = "/hidden_bias"
_BATCH = 8  # rows whose gradients are computed at once


def importance(
  run: LoadedRun, clusters: int, rows: int = 512, seed: int = 0
) -> dict[str, Float[np.ndarray, "C F"]]:
  """Returns the importance of each hidden unit of each FFN for each cluster of texts.

  The importance of unit f for a text is |sum over tokens of h_f dL/dh_f|, the first-order estimate
  of how much the loss of the text would change without the unit (arXiv 2406.16554, Sec. 3.1). It is
  the gradient of a factor of 1 on the unit, and is averaged over the texts of a cluster. Texts are
  rows of the run's training data, and clusters of equal size come from balanced k-means of their
  mean embeddings.

  Args:
    run: A run of a dense decoder.
    clusters: The number of clusters C.
    rows: The number of rows to read, rounded down to a multiple of `clusters` and of 8.
    seed: The seed of the clusters.

  Returns:
    The path of each FFN, such as "layer_0/ffn" -> [C, F].

  Raises:
    ConfigError: If there are too few rows, or if the model's FFNs have biases or no next tokens to
      predict.
  """
  config = run.config
  if config.model.ffn_bias != "none" or config.data.objective != "next_token":
    raise ConfigError(
      "model.ffn_bias",
      config.model.ffn_bias,
      "importance is for decoders without biases in their FFNs; take --method=random",
    )
  rows -= rows % int(np.lcm(clusters, _BATCH))
  if rows <= 0:
    raise ConfigError(
      "rows", rows, f"must be at least {int(np.lcm(clusters, _BATCH))}, for {clusters} clusters"
    )
  batches = _rows(config, rows)
  table = np.asarray(run.variables["params"]["embedding"], np.float32)
  mean = np.concatenate([_mean_embedding(table, batch) for batch in batches])
  label = balanced_clusters(mean, clusters, np.random.default_rng(seed))
  found: dict[str, list[np.ndarray]] = {}
  gradients = _gradients(run)
  for batch in batches:
    for name, values in gradients(batch).items():
      found.setdefault(name.removesuffix(_BIAS), []).append(values)
  joined = {path: np.concatenate(values) for path, values in found.items()}
  return {
    path: np.stack([values[label == c].mean(axis=0) for c in range(clusters)])
    for path, values in joined.items()
  }


def _rows(config: Config, rows: int) -> list[dict[str, np.ndarray]]:
  """Returns the first rows of the training data, in batches of `_BATCH`."""
  options = DataOptions.of(config.data)
  tokenizer = data.tokenizer_of(options)
  with contextlib.closing(
    data.train_iterator(options, tokenizer, data.make_sources(options), _BATCH)
  ) as batches:
    return [next(batches) for _ in range(rows // _BATCH)]


def _mean_embedding(table: np.ndarray, batch: dict[str, np.ndarray]) -> np.ndarray:
  """Returns the mean of the embeddings of each row's real tokens."""
  real = (batch["segment_ids"] > 0)[..., None]
  return (table[batch["inputs"]] * real).sum(axis=1) / np.maximum(real.sum(axis=1), 1)


def _gradients(run: LoadedRun) -> Any:
  """Returns a function of a batch that gives |gradients| by unrolled names, [rows, F] each."""
  config = type(run.config)(run.config.to_dict())
  config.model.ffn_bias = "multiplicative"
  mesh = sharding.make_mesh({"data": 1})
  vocab_size = assembly.vocab_size(config)
  model = assembly.model(config, vocab_size, mesh)
  leaves = unrolled.leaves(config, vocab_size, mesh)
  fixed = jax.tree.map(jnp.asarray, run.variables)
  factors = {leaf.path: jnp.ones(leaf.shape) for leaf in leaves if leaf.path[-1] == _BIAS[1:]}

  def loss(factors, row):
    batch = jax.tree.map(lambda leaf: leaf[None], row)
    variables = _with(fixed, factors)
    logits, _ = apply(model, variables, batch, train=False)
    wanted = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[
      ..., 0
    ]
    real = batch["segment_ids"] > 0
    return -jnp.sum(jnp.where(real, wanted, 0)) / jnp.maximum(real.sum(), 1)

  one = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))

  def gradients(batch) -> Weights:
    found = one(factors, {name: batch[name] for name in batch if batch[name].ndim == 2})
    names = {}
    for leaf in leaves:
      if leaf.path in found:
        values = np.abs(np.asarray(found[leaf.path]))
        for i, name in enumerate(leaf.names):
          names[name] = values[:, i] if leaf.stacked else values
    return names

  return gradients


def _with(variables: Any, leaves: dict[tuple[str, ...], Any]) -> Any:
  """Returns a copy of the variables with further leaves at these paths."""
  copy = jax.tree.map(lambda leaf: leaf, variables)
  for path, value in leaves.items():
    node = copy
    for key in path[:-1]:
      node = node[key]
    node[path[-1]] = value
  return copy
