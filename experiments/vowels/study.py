"""The comparison of Table 1: models, the search for their step sizes, 25 runs of each, and t-tests
between them."""

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
SEEDS, SEARCHED = 25, 5  # the first of the seeds choose the step size
STEP_SIZES = tuple(2.0 ** (half / 2) for half in range(13))  # 1 to 64
MAX_EPOCHS = {"pairs": 3000, "classes": 1500}
IN_USE = (
  0.05  # an expert is in use where the gate gives it at least this share of the training cases
)


@dataclasses.dataclass(frozen=True)
class Condition:
  """What the paper leaves open. outputs: a key of `TARGETS`; order: of speakers; init_scale: of the
  weights."""

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
  """A row of the table, as JSON; the network; its runs, one a seed."""

  row: dict[str, Any]
  network: nn.Module
  runs: Runs


def run(cases: Cases, condition: Condition, model: str, error: str) -> Trained:
  """Searches a step size with the first `SEARCHED` seeds, then trains all seeds with it.

  It is that of the fewest epochs on average, where a run without the criterion counts as one that
  took all. A single seed would choose the largest with which it still arrives, where the next one
  does not, nor the same one on a machine that rounds otherwise.

  Args:
    cases: of all speakers.
    condition: what is tried.
    model: a key of `MODELS`.
    error: a key of `ERRORS`; the first is the squared error of back-propagation, whose one expert
      is its answer.
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
  """What the paper trains it with: mixtures with the competitive error, back-propagation with its
  squared error."""
  return "cooperative" if model.startswith("BP") else "competitive"


def t_test(first: list[int], second: list[int]) -> dict[str, float]:
  """Student's t with pooled variance: t > 0 where `first` is larger, degrees of freedom, and p,
  two-sided."""
  found = scipy.stats.ttest_ind(first, second, equal_var=True)
  return {"t": float(found.statistic), "df": int(found.df), "p": float(found.pvalue)}


def in_use(gate: np.ndarray) -> np.ndarray:
  """Indices of the experts in use. `gate`: [N, E]."""
  return np.flatnonzero(gate.mean(0) >= IN_USE)


def _correct(network, runs, cases, targets) -> list[float]:
  """Share of cases, by run, whose most probable class is the right one."""
  x = jnp.asarray(cases.formants)
  answer = np.asarray(jax.vmap(lambda p: blend(*network.apply({"params": p}, x)))(runs.params))
  target = targets[cases.vowel]
  if target.shape[-1] == 1:
    return ((answer > 0.5) == (target > 0.5))[..., 0].mean(-1).tolist()
  return (answer.argmax(-1) == target.argmax(-1)).mean(-1).tolist()
