"""Fits a law as Hoffmann et al. 2022 fitted theirs, with bootstrap intervals; predicts, and divides
a budget.

The objective is sum of Huber_δ(ln L_law - ln L), δ = 1e-3; L-BFGS descends from the best of a grid
of starts, and Gauss-Newton steps with a trust region on the same objective end what it began:
L-BFGS alone stops early where constants are as correlated as A and α are (Besiroglu et al. 2024
found the published fit stopped early).

Deviation: the paper descends from all starts of its grid. Kaplan's, Clark's and Krajewski's laws
are fitted so, too, each from a grid of its own, whatever their papers did.
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
DESCENTS = 12  # unless more are asked for
STEPS = 60  # of L-BFGS, at most
POLISHED = 4  # ends of these descents at which Gauss-Newton takes over
LEVEL = 95.0  # percent, of the intervals
_SMALL = 1e-30  # step of the complex derivative, which has no error of cancellation


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law.

  Attributes:
    name: of the law, a key of `LAWS`.
    points: what it was fitted to.
    coordinates: [K], of the constants.
    resampled: [R, K], coordinates fitted to R bootstrap samples of the points.
    objective: the sum of Huber losses.
    r2: of ln L: the share of its variance that the law explains; at most 1.
  """

  name: str
  points: Points
  coordinates: np.ndarray
  resampled: np.ndarray
  objective: float
  r2: float

  @property
  def law(self) -> Law:
    return LAWS[self.name]

  def constants(self) -> dict[str, tuple[float, float, float]]:
    """name -> (value, lower, upper end of the percentile interval; nan without a bootstrap)."""
    values = np.array(self.law.back(self.coordinates))
    ends = _interval(np.array(self.law.back(self.resampled.T)).T)
    return {
      name: (float(values[i]), *ends[:, i].tolist()) for i, name in enumerate(self.law.constants)
    }

  def loss(self, at: Points) -> np.ndarray:
    """[3, P]: loss by the law and the ends of its interval: of the curve, not of a single run about
    it."""
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
  """Fits a law and as many bootstrap samples, each from the best constants on.

  Args:
    points: at least one more than the law has constants.
    name: a key of `LAWS`.
    bootstrap: R, resamples of the points with replacement.
    seed: of the resampling.
    descents: starts of the grid, those of the least objective, from which L-BFGS descends.

  Raises:
    ConfigError: too few points, or too few different values of a column for the constants to be
      told apart.
  """
  law = LAWS[name]
  _check(points, name)
  best = min(
    (_polish(law, start, points) for start in _descend(law, points, descents)),
    key=lambda found: found[1],
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
  """The N and D of least loss for a budget of training FLOPs, and that loss: each (value, lower,
  upper end).

  Raises:
    ConfigError: the law's paper says nothing of FLOPs, or the budget is not positive.
  """
  law = found.law
  if law.flops_a_token is None:
    raise ConfigError(
      "flops",
      flops,
      f"{law.paper} has no division of FLOPs into N and D; laws that have: "
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
  """[2, ...]: percentile interval over the first axis; nan where there are no samples."""
  if not len(samples):
    return np.full((2, *samples.shape[1:]), np.nan)
  return np.percentile(samples, (50 - LEVEL / 2, 50 + LEVEL / 2), axis=0)


def _log_loss(law: Law, coordinates, points: Points) -> np.ndarray:
  with np.errstate(
    all="ignore"
  ):  # far from the points anything may overflow; such a start is not taken
    return law.log_loss(points, *law.back(coordinates))


def _derivative(law: Law, coordinates: np.ndarray, points: Points) -> np.ndarray:
  """[P, K], of ln L by the coordinates."""
  moved = coordinates[:, None] + 1j * _SMALL * np.eye(
    len(coordinates)
  )  # [K, K], of which a column is a direction
  return _log_loss(law, moved[..., None], points).imag.T / _SMALL


def _descend(law: Law, points: Points, descents: int) -> list[np.ndarray]:
  """Ends of L-BFGS from the best starts of the law's grid, the best `POLISHED` of them."""
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
  """(coordinates, objective) at the minimum near `start`; ends where a step changes either by less,
  relatively."""
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
