"""The comparison of Table 1: models, their step sizes, 25 runs of each, and t-tests."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from flax import linen as nn

from experiments.vowels.data import TARGETS, Cases, split
from experiments.vowels.training import Runs, begin, descend
from moe_jax.models.mixture import AdaptiveMixture, BackPropagation, blend
from moe_jax.routing import mixture_errors

CRITERION = 0.08
SEEDS, SEARCHED = 25, 5  # all seeds, and the first ones, which choose the step size
STEP_SIZES = tuple(2.0 ** (half / 2) for half in range(13))  # 1 to 64
MAX_EPOCHS = {"pairs": 3000, "classes": 1500}
# An expert is in use if the gate gives it at least this share of the training cases.
IN_USE = 0.05


@dataclasses.dataclass(frozen=True)
class Condition:
  """A choice of what the paper leaves open.

  Attributes:
    outputs: A key of `TARGETS`.
    order: The order of the speakers, as in `data.split`.
    init_scale: The scale of the initial weights.
  """

  outputs: str = "pairs"
  order: str = "file"
  init_scale: float = 1.0


CONDITIONS = {
  "pairs": Condition(),
  "pairs, speakers shuffled": Condition(order="random"),
  "pairs, small initial weights": Condition(init_scale=0.3),
  "classes": Condition("classes"),
  "classes, speakers shuffled": Condition("classes", "random"),
}
DRAWN = ("pairs", "pairs, small initial weights")
MODELS = {
  "4 experts": lambda c, s: AdaptiveMixture(4, c, s),
  "8 experts": lambda c, s: AdaptiveMixture(8, c, s),
  "BP 6 hidden": lambda c, s: BackPropagation(6, c, s),
  "BP 12 hidden": lambda c, s: BackPropagation(12, c, s),
}
ERRORS = {
  name: getattr(mixture_errors, name) for name in ("cooperative", "expected", "competitive")
}
PAIRS = (
  ("4 experts", "BP 6 hidden"),
  ("8 experts", "BP 12 hidden"),
  ("4 experts", "8 experts"),
  ("BP 6 hidden", "BP 12 hidden"),
)


class Trained(NamedTuple):
  """A trained model.

  Attributes:
    row: Its row of the table, as JSON.
    network: The network.
    runs: Its runs, one for each seed.
  """

  row: dict[str, Any]
  network: nn.Module
  runs: Runs


def run(cases: Cases, condition: Condition, model: str, error: str) -> Trained:
  """Searches a step size with the first `SEARCHED` seeds, then trains all seeds with it.

  The step size is the one with the fewest epochs on average. A run that does not reach the
  criterion counts with the largest number of epochs. A single seed would choose the largest step
  size with which it still arrives; the next seed does not arrive with it, nor does the same seed on
  a machine that rounds differently.

  Args:
    cases: The cases of all speakers.
    condition: What the paper leaves open.
    model: A key of `MODELS`.
    error: A key of `ERRORS`. "cooperative" is the squared error of back-propagation, whose answer
      counts as that of one expert.
  """
  train, test = split(cases, condition.order)
  targets, limit = TARGETS[condition.outputs], MAX_EPOCHS[condition.outputs]
  network = MODELS[model](targets.shape[1], condition.init_scale)

  def descent(params, sizes):
    return jax.device_get(
      descend(
        network,
        ERRORS[error],
        train.formants,
        targets[train.vowel],
        params,
        sizes,
        CRITERION,
        limit,
      )
    )

  tried = jax.tree.map(
    lambda leaf: jnp.tile(leaf, (len(STEP_SIZES), *[1] * (leaf.ndim - 1))),
    begin(network, range(SEARCHED), 2),
  )
  search = descent(tried, jnp.repeat(jnp.array(STEP_SIZES), SEARCHED))
  epochs = np.where(search.reached, search.epochs, limit).reshape(len(STEP_SIZES), SEARCHED)
  arrived = search.reached.reshape(epochs.shape).all(axis=1)
  best = int(epochs.mean(axis=1).argmin())
  runs = descent(begin(network, range(SEEDS), 2), jnp.full(SEEDS, STEP_SIZES[best]))
  correct = {
    "train": _correct(network, runs, train, targets),
    "test": _correct(network, runs, test, targets),
  }
  gate = jax.vmap(lambda p: network.apply({"params": p}, jnp.asarray(train.formants))[0])(
    runs.params
  )
  row = {
    "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(runs.params)),
    "step_size": STEP_SIZES[best],
    "search": [
      float(n) if all_did else None for n, all_did in zip(epochs.mean(axis=1), arrived, strict=True)
    ],
    "epochs": runs.epochs.tolist(),
    "reached": runs.reached.tolist(),
    "in_use": [in_use(one).size for one in np.asarray(gate)],
  } | correct
  return Trained(row, network, runs)


def error_of(model: str) -> str:
  """Returns the error with which the paper trains a model.

  It is the competitive error for mixtures, and the squared error for back-propagation.
  """
  return "cooperative" if model.startswith("BP") else "competitive"


def t_test(first: list[int], second: list[int]) -> dict[str, float]:
  """Returns Student's t with pooled variance, its degrees of freedom, and the two-sided p.

  t is positive if the mean of `first` is larger.
  """
  result = scipy.stats.ttest_ind(first, second, equal_var=True)
  return {"t": float(result.statistic), "df": int(result.df), "p": float(result.pvalue)}


def in_use(gate: np.ndarray) -> np.ndarray:
  """Returns the indices of the experts in use.

  Args:
    gate: [N, E], the gate's probabilities of each case.
  """
  return np.flatnonzero(gate.mean(0) >= IN_USE)


def _correct(network, runs, cases, targets) -> list[float]:
  """Returns for each run the share of cases whose most probable class is the right one."""
  x = jnp.asarray(cases.formants)
  answer = np.asarray(jax.vmap(lambda p: blend(*network.apply({"params": p}, x)))(runs.params))
  target = targets[cases.vowel]
  if target.shape[-1] == 1:
    return ((answer > 0.5) == (target > 0.5))[..., 0].mean(-1).tolist()
  return (answer.argmax(-1) == target.argmax(-1)).mean(-1).tolist()
