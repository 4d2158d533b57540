"""Published scaling laws: the held-out loss from size, tokens, experts and granularity.

Every law is an entry of `LAWS`. A fit varies coordinates that may be any real number: the logarithm
of a constant that must be positive, or the constant itself. `_clark_coordinates` explains how the
two bounds of Ê are kept in order.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# The kinds of N. A table of points has these as columns, or a column `n` that counts as the law's
# paper does.
SIZES = {
  "n_total": "all parameters",
  "n_body": "all parameters but embeddings",
  "n_activated": "parameters that a token meets, without embeddings",
}


class Points(NamedTuple):
  """P trained models, one in each entry of the arrays [P].

  Attributes:
    n: The number of parameters, counted as the law counts them.
    d: The number of tokens read in training.
    experts: E, the parameters of all experts over those of the dense FFN that they replace. 1 means
      a dense model.
    granularity: G, the width of that FFN over the width of an expert. A token visits G of the E G
      experts.
    loss: The held-out loss in nats per token.
  """

  n: np.ndarray
  d: np.ndarray
  experts: np.ndarray
  granularity: np.ndarray
  loss: np.ndarray

  def of(self, index) -> Points:
    """Returns the points that `index` picks."""
    return Points(*(field[index] for field in self))


@dataclasses.dataclass(frozen=True)
class Law:
  """A scaling law.

  Attributes:
    paper: The paper and the number of its equation.
    equation: The equation in the paper's symbols.
    log_loss: Maps (points, *constants) to ln L [P]. It also takes complex constants, and constants
      of shape [R, 1] for R laws at once.
    constants: The names of the constants, in the order of `log_loss`.
    published: Source -> constants as printed; the first source is the paper itself.
    reads: A column that the law reads -> the number of different values that a fit needs of it.
    size: What N counts, a key of `SIZES`.
    held: A column that the law does not read, though points may differ in it -> the function that
      picks the one value whose points are used.
    starts: For each coordinate the values from which a descent begins; all combinations are tried.
    coordinates: Maps constants to coordinates.
    back: Maps coordinates to constants.
    flops_a_token: Maps (N, E, G) to the FLOPs of training on a token. None means that the paper
      does not say, so that a budget cannot be divided.
  """

  paper: str
  equation: str
  log_loss: Callable[..., np.ndarray]
  constants: tuple[str, ...]
  published: Mapping[str, tuple[float, ...]]
  reads: Mapping[str, int]
  size: str
  held: Mapping[str, Callable]
  starts: tuple[tuple[float, ...], ...]
  coordinates: Callable[[Sequence], list]
  back: Callable[[Sequence], list]
  flops_a_token: Callable[[float, float, float], float] | None = None


def _log_sum(*terms):
  """Returns ln(sum of exp(term)); the terms may be complex."""
  terms = np.stack(np.broadcast_arrays(*terms))
  # The largest real part is taken out, so that exp does not overflow.
  most = terms.real.max(axis=0)
  return most + np.log(np.exp(terms - most).sum(axis=0))


def kaplan(points: Points, n_c, d_c, alpha_n, alpha_d) -> np.ndarray:
  """Returns ln L of Kaplan et al. 2020, Eq. 1.5.

  The models are trained on D tokens until the held-out loss rises.

  L(N, D) = [(N_c / N)^(α_N / α_D) + D_c / D]^α_D
  """
  return alpha_d * _log_sum(
    alpha_n / alpha_d * (np.log(n_c) - np.log(points.n)), np.log(d_c) - np.log(points.d)
  )


def chinchilla(points: Points, e, a, b, alpha, beta) -> np.ndarray:
  """Returns ln L of Hoffmann et al. 2022, Eq. 2: models trained on D tokens, each read once.

  L(N, D) = E + A / N^α + B / D^β
  """
  return _log_sum(
    np.log(e), np.log(a) - alpha * np.log(points.n), np.log(b) - beta * np.log(points.d)
  )


def clark(points: Points, a, b, c, d, e_start, e_max) -> np.ndarray:
  """Returns ln L of Clark et al. 2022, Eq. 1: dense models of N parameters get E experts per FFN.

  All models are trained on the same number of tokens.

    log L(N, E) = a log N + b log Ê + c log N log Ê + d
    1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max

  The logarithms of the equation are decimal. Ê is E_start for a dense model and approaches E_max as
  E grows.
  """
  effective = 1 / (1 / (points.experts - 1 + 1 / (1 / e_start - 1 / e_max)) + 1 / e_max)
  log_n, log_e = np.log10(points.n), np.log10(effective)
  return np.log(10) * (a * log_n + b * log_e + c * log_n * log_e + d)


def krajewski(points: Points, c, g, gamma, a, alpha, b, beta) -> np.ndarray:
  """Returns ln L of the law with granularity of Krajewski et al. 2024, at one value of E.

  The experts have 1/G of the FFN's width, and a token visits G of them.

  L(N, D, G) = c + (g / G^γ + a) / N^α + b / D^β
  """
  experts = _log_sum(np.log(g) - gamma * np.log(points.granularity), np.log(a))
  return _log_sum(
    np.log(c), experts - alpha * np.log(points.n), np.log(b) - beta * np.log(points.d)
  )


def six_n(n: float, experts: float, granularity: float) -> float:
  """Returns the training FLOPs per token of Hoffmann et al. 2022, section 3.3: C = 6 N D."""
  return 6 * n


def fine_grained(n: float, experts: float, granularity: float) -> float:
  """Returns the training FLOPs per token of Krajewski et al. 2024.

    F = (12 d² c_f + d E G c_r) D n_blocks, where d = 64 n_blocks and N = d² (8 E + 4) n_blocks

  Deviation: c_r, the router's FLOPs per weight, is 6 as for the matmuls of c_f, because the paper's
  value was not at hand.
  """
  width = np.cbrt(64 * n / (8 * experts + 4))
  return 6 * (12 * width**2 + width * experts * granularity) * width / 64


def _coordinates(positive: str) -> tuple[Callable, Callable]:
  """Returns the maps from constants to coordinates and back.

  Args:
    positive: A "+" for each constant whose logarithm is the coordinate, and a "." for each constant
      that is the coordinate itself.
  """

  def to_coordinates(constants):
    return [np.log(x) if sign == "+" else x for x, sign in zip(constants, positive, strict=True)]

  def to_constants(values):
    return [np.exp(x) if sign == "+" else x for x, sign in zip(values, positive, strict=True)]

  return to_coordinates, to_constants


def _clark_coordinates(constants):
  """Returns Clark's coordinates.

  The last two are the logarithms of E_start E_max / (E_max - E_start) and of E_max, so that any two
  real numbers mean E_start < E_max.
  """
  *line, start, most = constants
  return [*line, -np.log(1 / start - 1 / most), np.log(most)]


def _clark_constants(values):
  """Returns the constants of Clark's coordinates."""
  *line, x, y = values
  return [*line, 1 / (np.exp(-x) + np.exp(-y)), np.exp(y)]


_EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
_KAPLAN, _CHINCHILLA, _KRAJEWSKI = (_coordinates(signs) for signs in ("++..", "+++..", "++.+.+."))
LAWS = {
  "kaplan": Law(
    "Kaplan et al. 2020, Eq. 1.5",
    "L = [(N_c / N)^(α_N / α_D) + D_c / D]^α_D",
    kaplan,
    ("N_c", "D_c", "α_N", "α_D"),
    {"paper": (6.4e13, 1.8e13, 0.076, 0.103)},
    {"n": 2, "d": 2},
    "n_body",
    {"experts": min, "granularity": min},
    ((20.0, 25.0, 30.0, 35.0, 40.0),) * 2 + ((0.05, 0.1, 0.2, 0.4),) * 2,
    *_KAPLAN,
  ),
  "chinchilla": Law(
    "Hoffmann et al. 2022, Eq. 2",
    "L = E + A / N^α + B / D^β",
    chinchilla,
    ("E", "A", "B", "α", "β"),
    {
      "paper": (1.69, 406.4, 410.7, 0.34, 0.28),
      "before rounding": (1.6934, 406.4, 410.7, 0.3392, 0.2849),
      "Besiroglu et al. 2024": (1.8172, 482.01, 2085.43, 0.3478, 0.3658),
    },
    {"n": 3, "d": 3},
    "n_total",
    {"experts": min, "granularity": min},
    (
      (-1.0, -0.5, 0.0, 0.5, 1.0),
      *((0.0, 5.0, 10.0, 15.0, 20.0, 25.0),) * 2,
      _EXPONENTS,
      _EXPONENTS,
    ),
    *_CHINCHILLA,
    six_n,
  ),
  "clark": Law(
    "Clark et al. 2022, Eq. 1",
    "log L = a log N + b log Ê + c log N log Ê + d",
    clark,
    ("a", "b", "c", "d", "E_start", "E_max"),
    {
      "S-BASE": (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
      "RL-R": (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
      "HASH": (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
    },
    {"n": 2, "experts": 4},
    "n_activated",
    {"granularity": min, "d": max},
    (
      (-0.2, -0.1, -0.05),
      (-0.3, -0.1, 0.0),
      (0.0, 0.02),
      (0.5, 1.0, 1.5),
      (0.5, 2.0),
      (3.0, 5.0, 7.0),
    ),
    _clark_coordinates,
    _clark_constants,
  ),
  "krajewski": Law(
    "Krajewski et al. 2024, with granularity",
    "L = c + (g / G^γ + a) / N^α + b / D^β",
    krajewski,
    ("c", "g", "γ", "a", "α", "b", "β"),
    {"paper": (0.47, 2.1, 0.58, 18.1, 0.115, 30.8, 0.147)},
    {"n": 3, "d": 3, "granularity": 3},
    "n_body",
    {"experts": statistics.mode},
    (
      (-1.0, 0.0, 0.5),
      (0.0, 3.0),
      (0.5, 1.0),
      (2.0, 5.0, 10.0),
      (0.1, 0.3, 0.6),
      (2.0, 5.0, 10.0),
      (0.1, 0.3, 0.6),
    ),
    *_KRAJEWSKI,
    fine_grained,
  ),
}
