"""Checks of the options of routers, which raise the same messages for all of them."""

from __future__ import annotations

import fractions
import math
from typing import Annotated

from moe_jax.errors import ConfigError, choose
from moe_jax.options import CAPACITY, COUNT_OF_EXPERTS, NOT_NEGATIVE, POSITIVE, SEED, Bounds

# Types of routers' options, with the bounds that a config's values are checked against.
Count = Annotated[int, COUNT_OF_EXPERTS]
Factor = Annotated[float, CAPACITY]
Seed = Annotated[int, SEED]
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, NOT_NEGATIVE]
Iterations = Annotated[
  int, Bounds(1, 10_000, "they run one after the other in each layer of each step")
]
Divisor = Annotated[
  float, Bounds(1e-6, 1e6, "logits or probabilities are divided by it in float32")
]
Precision = Annotated[float, Bounds(1e-4, 1, "a part of the range of the logits")]


def check_k(router: str, k: int, num_experts: int, field: str = "k") -> None:
  """Raises ConfigError unless 1 <= k <= num_experts."""
  if not 1 <= k <= num_experts:
    raise ConfigError(
      f"model.moe.router.{router}.{field}",
      k,
      f"a token takes between 1 and num_experts={num_experts} experts",
    )


def check_name(router: str, field: str, name: str, known) -> None:
  """Raises ConfigError, which suggests the nearest match, unless `name` is one of `known`."""
  choose(f"model.moe.router.{router}.{field}", name, known)


def slots(
  router: str,
  factor: float | int,
  tokens: int,
  experts: int,
  unit: str,
  field: str = "capacity_factor",
) -> int:
  """Returns the number of slots per expert for routers that fix it themselves.

  It is factor * tokens / experts, rounded to the nearest integer and clipped to [1, tokens].

  Args:
    router: The name of the router, for the error message.
    factor: The router's capacity factor, > 0 and finite.
    tokens: The number of tokens of a group, S.
    experts: The number of experts, E.
    unit: The unit of the factor, for the error message.
    field: The name of the option that holds the factor, for the error message.

  Raises:
    ConfigError: If the factor is not positive and finite.
  """
  check(router, field, factor, 0 < factor < math.inf, f"> 0 and finite, in {unit}")
  return min(max(round(exact(factor) * tokens / experts), 1), tokens)


def exact(factor: float | int) -> fractions.Fraction:
  """Returns the number that the decimal notation of `factor` stands for, as an exact fraction.

  The factor 1.1 becomes 11/10 and not the nearest float, which is slightly larger. Products with
  the fraction are exact, so that 1.1 * 1600 / 4 rounds up to 440 and not to 441.
  """
  return fractions.Fraction(repr(float(factor)))


def check(router: str, field: str, value, holds: bool, must: str) -> None:
  """Raises ConfigError "must be {must}" unless `holds`."""
  if not holds:
    raise ConfigError(f"model.moe.router.{router}.{field}", value, f"must be {must}")
