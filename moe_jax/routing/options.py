"""Checks of routers' options, with the same words everywhere."""

from __future__ import annotations

from moe_jax.errors import ConfigError, choose


def check_k(router: str, k: int, num_experts: int, field: str = "k") -> None:
  """Raises ConfigError unless 1 <= k <= num_experts."""
  if not 1 <= k <= num_experts:
    raise ConfigError(f"model.moe.router.{router}.{field}", k,
                      f"a token takes between 1 and num_experts={num_experts} experts")


def check_name(router: str, field: str, name: str, known) -> None:
  """Raises ConfigError, with the nearest match, unless `name` is one of `known`."""
  choose(f"model.moe.router.{router}.{field}", name, known)


def check(router: str, field: str, value, holds: bool, must: str) -> None:
  """Raises ConfigError "must be {must}" unless `holds`."""
  if not holds:
    raise ConfigError(f"model.moe.router.{router}.{field}", value, f"must be {must}")
