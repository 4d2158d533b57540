"""Fits laws as Hoffmann et al. 2022 did, with bootstrap intervals, and divides budgets.

The objective is the sum of Huber_δ(ln L_law - ln L) with δ = 1e-3. L-BFGS descends from the best
starts of a grid, and Gauss-Newton steps with a trust region then finish the descent on the same
objective. L-BFGS alone stops early if constants are as correlated as A and α are: Besiroglu et al.
2024 found that the published fit had stopped early.

Deviation: the paper descends from all starts of its grid. The laws of Kaplan, Clark and Krajewski
are fitted in the same way, each from a grid of its own, whatever their papers did.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import scipy.optimize
import scipy.special

from experiments.scaling_laws.laws import LAWS, Law, Points
from moe_jax.errors import ConfigError

DELTA = 1e-3
DESCENTS = 12  # starts from which L-BFGS descends, by default
STEPS = 60  # the largest number of steps of L-BFGS
POLISHED = 4  # the best ends of these descents, which Gauss-Newton continues
LEVEL = 95.0  # the level of the intervals in percent
# The step of the complex-step derivative. It can be this small because nothing cancels.
_SMALL = 1e-30


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law with K constants.

  Attributes:
    name: The law, a key of `LAWS`.
    points: The points that it was fitted to.
    coordinates: [K], the coordinates of the constants.
    resampled: [R, K], the coordinates fitted to R bootstrap samples of the points.
    objective: The sum of Huber losses.
    r2: The share of the variance of ln L that the law explains, at most 1.
  """

  name: str
  points: Points
  coordinates: np.ndarray
  resampled: np.ndarray
  objective: float
  r2: float

  @property
  def law(self) -> Law:
    """The law itself."""
    return LAWS[self.name]

  def constants(self) -> dict[str, tuple[float, float, float]]:
    """Returns the constants by name, as (value, lower end, upper end of the percentile interval).

    The ends are NaN if there was no bootstrap.
    """
    values = np.array(self.law.back(self.coordinates))
    ends = _interval(np.array(self.law.back(self.resampled.T)).T)
    return {
      name: (float(values[i]), *ends[:, i].tolist()) for i, name in enumerate(self.law.constants)
    }

  def loss(self, at: Points) -> np.ndarray:
    """Returns [3, P]: the loss by the law, and the ends of its interval.

    The interval is that of the curve, not of a single run around it.
    """
    value = np.exp(_log_loss(self.law, self.coordinates, at))
    many = (
      np.exp(_log_loss(self.law, self.resampled.T[..., None], at))
      if len(self.resampled)
      else np.empty((0, len(value)))
    )
    return np.stack([value, *_interval(many)])


def fit(
  points: Points, name: str, bootstrap: int = 200, seed: int = 0, descents: int = DESCENTS
) -> Fit:
  """Fits a law to points, and to bootstrap samples of them starting from the best constants.

  Args:
    points: At least one more point than the law has constants.
    name: A key of `LAWS`.
    bootstrap: R, the number of resamples of the points with replacement.
    seed: Seeds the resampling.
    descents: The number of starts of the grid, those of the least objective, from which L-BFGS
      descends.

  Raises:
    ConfigError: There are too few points, or too few different values of a column to tell the
      constants apart.
  """
  law = LAWS[name]
  _check(points, name)
  best = min(
    (_polish(law, start, points) for start in _descend(law, points, descents)),
    key=lambda end: end[1],
  )
  random, count = np.random.default_rng(seed), len(points.loss)
  resampled = [
    _polish(law, best[0], points.of(random.integers(count, size=count)), 1e-6)[0]
    for _ in range(bootstrap)
  ]
  left = _log_loss(law, best[0], points) - np.log(points.loss)
  r2 = 1 - np.sum(left**2) / np.sum((np.log(points.loss) - np.log(points.loss).mean()) ** 2)
  return Fit(
    name,
    points,
    best[0],
    np.array(resampled).reshape(bootstrap, len(law.constants)),
    float(best[1]),
    float(r2),
  )


def divide(
  found: Fit, flops: float, experts: float, granularity: float
) -> dict[str, tuple[float, float, float]]:
  """Returns the N and D of least loss for a budget of training FLOPs, and that loss.

  Args:
    found: A fitted law.
    flops: The budget.
    experts: E of the models.
    granularity: G of the models.

  Returns:
    "n", "d" and "loss", each as (value, lower end, upper end of the interval).

  Raises:
    ConfigError: The law's paper says nothing about FLOPs, or the budget is not positive.
  """
  law = found.law
  if law.flops_a_token is None:
    raise ConfigError(
      "flops",
      flops,
      f"{law.paper} does not divide FLOPs into N and D; laws that do: "
      + ", ".join(name for name, other in LAWS.items() if other.flops_a_token),
    )
  if not flops > 0:
    raise ConfigError("flops", flops, "must be above 0")

  def cost(n):
    return law.flops_a_token(n, experts, granularity)

  def best(coordinates):
    def tokens(log_n):
      return flops / cost(np.exp(log_n))

    def at(log_n):
      return Points(*np.array([np.exp(log_n), tokens(log_n), experts, granularity, 1.0])[:, None])

    def loss(log_n):
      return float(_log_loss(law, coordinates, at(log_n))[0])

    log_n = scipy.optimize.minimize_scalar(
      loss, bounds=(0.0, np.log(flops)), method="bounded", options={"xatol": 1e-7}
    ).x
    return float(at(log_n).n[0]), float(at(log_n).d[0]), float(np.exp(loss(log_n)))

  value = best(found.coordinates)
  ends = _interval(np.array([best(row) for row in found.resampled]).reshape(-1, 3))
  return {key: (value[i], *ends[:, i].tolist()) for i, key in enumerate(("n", "d", "loss"))}


def _check(points: Points, name: str) -> None:
  law = LAWS[name]
  if len(points.loss) <= len(law.constants):
    raise ConfigError(
      "fit",
      name,
      f"{len(points.loss)} points are too few for its {len(law.constants)} constants; "
      f"it takes {len(law.constants) + 1} or more",
    )
  for column, least in law.reads.items():
    different = len(np.unique(getattr(points, column)))
    if different < least:
      raise ConfigError(
        "fit",
        name,
        f"its points have {different} value{'s' * (different > 1)} of {column}, and its "
        f"constants take {least} or more to be told apart",
      )


def _interval(samples: np.ndarray) -> np.ndarray:
  """Returns [2, ...]: the percentile interval over the first axis, or NaN without samples."""
  if not len(samples):
    return np.full((2, *samples.shape[1:]), np.nan)
  return np.percentile(samples, (50 - LEVEL / 2, 50 + LEVEL / 2), axis=0)


def _log_loss(law: Law, coordinates, points: Points) -> np.ndarray:
  # Far from the points anything may overflow, and such a start is not taken.
  with np.errstate(all="ignore"):
    return law.log_loss(points, *law.back(coordinates))


def _derivative(law: Law, coordinates: np.ndarray, points: Points) -> np.ndarray:
  """Returns [P, K], the derivative of ln L by the coordinates, by complex steps."""
  # [K, K], in which each column is a step in one direction.
  moved = coordinates[:, None] + 1j * _SMALL * np.eye(len(coordinates))
  return _log_loss(law, moved[..., None], points).imag.T / _SMALL


def _descend(law: Law, points: Points, descents: int) -> list[np.ndarray]:
  """Returns the `POLISHED` best ends of L-BFGS from the best starts of the law's grid."""
  log_loss = np.log(points.loss)

  def objective(coordinates):
    left = _log_loss(law, coordinates, points) - log_loss
    slope = np.einsum(
      "pk,p->k", _derivative(law, coordinates, points), np.clip(left, -DELTA, DELTA)
    )
    return np.sum(scipy.special.huber(DELTA, left)) / DELTA, slope / DELTA

  grid = np.array(list(itertools.product(*law.starts)))
  values = np.sum(
    scipy.special.huber(DELTA, _log_loss(law, grid.T[..., None], points) - log_loss), axis=-1
  )
  starts = grid[np.argsort(np.where(np.isfinite(values), values, np.inf))[:descents]]
  ends = [
    scipy.optimize.minimize(
      objective, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}
    )
    for start in starts
  ]
  return [end.x for end in sorted(ends, key=lambda end: end.fun)[:POLISHED]]


def _polish(
  law: Law, start: np.ndarray, points: Points, tolerance: float = 1e-12
) -> tuple[np.ndarray, float]:
  """Returns the coordinates and the objective at the minimum near `start`.

  It ends when a step changes both by less than `tolerance` relatively.
  """
  log_loss = np.log(points.loss)
  end = scipy.optimize.least_squares(
    lambda x: _log_loss(law, x, points) - log_loss,
    start,
    lambda x: _derivative(law, x, points),
    loss="huber",
    f_scale=DELTA,
    x_scale="jac",
    xtol=tolerance,
    ftol=tolerance,
    gtol=1e-14,
    max_nfev=300,
  )
  return end.x, end.cost
