"""Routers of a user's own file, for `--router=FILE.py:NAME`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_jax.assembly.sections import name_of
from moe_jax.commands.config_file import execute, expand
from moe_jax.errors import ConfigError, shorten
from moe_jax.routing import Leak, Router

_EXAMPLE = "write --router=FILE.py:NAME, where FILE.py defines NAME"


def load_router(text: str) -> tuple[str, Router]:
  """Returns the name of a router and the router, from a file.

  Args:
    text: FILE.py:NAME. NAME is a `Router` of the file, or the function of one. A function is taken
      to look ahead if it does so for random logits; see `observed_leak`.

  Returns:
    The name of the router's function, and the router.

  Raises:
    ConfigError: There is no such file or name, the file cannot be executed, or the object is no
      router.
  """
  place, colon, name = text.rpartition(":")
  if not colon or not name.isidentifier():
    raise ConfigError("router", text, _EXAMPLE)
  file = expand("router", place)
  if not file.is_file() or file.suffix != ".py":
    raise ConfigError("router", text, f"there is no Python file {place!r}; {_EXAMPLE}")
  try:
    value: Any = getattr(execute(file), name, None)
  except (Exception, SystemExit) as error:
    # The Python file of a user may raise anything.
    raise ConfigError(
      "router", text, f"{type(error).__name__}: {shorten(str(error))}; mend {file}"
    ) from error
  if isinstance(value, Router):
    return name_of(value), value
  if not callable(value):
    raise ConfigError(
      "router",
      text,
      f"{place} defines no router of that name; it must be a function (logits [S, E], context) -> "
      "RoutingPlan, or a moe_jax.routing.Router",
    )
  route: Callable[..., Any] = value
  router = Router(route, looks_ahead=observed_leak(route, text))
  return name_of(router), router


def observed_leak(route: Callable, text: str) -> Leak:
  """Returns "yes" if later tokens change the routing of earlier ones for random logits, else "no".

  The function is tried on one group in training, without a key.

  Args:
    route: The function of a router, which is called with its default options.
    text: What the user wrote, for messages.

  Raises:
    ConfigError: The function fails, or returns no plan of the tokens and experts that it was given.
  """
  import jax
  import jax.numpy as jnp

  from moe_jax.routing import RoutingContext, RoutingPlan

  tokens, experts = 32, 8
  logits, others = jax.random.normal(jax.random.key(0), (2, tokens, experts))
  is_early = jnp.arange(tokens) < tokens // 2
  context = RoutingContext(token_ids=jnp.arange(tokens, dtype=jnp.int32), train=True)

  def gates(values):
    """Returns the gate of each early token and expert, and -1 where there is no assignment."""
    plan = route(values, context)
    if not isinstance(plan, RoutingPlan):
      raise ConfigError(
        "router", text, f"returns {type(plan).__name__}, and must return a moe_jax.RoutingPlan"
      )
    table = jnp.full((tokens, experts), -1.0)
    return table.at[plan.token, plan.expert].max(plan.gate, mode="drop")[is_early]

  try:
    before = gates(logits)
    after = gates(jnp.where(is_early[:, None], logits, others))
  except ConfigError:
    raise
  except Exception as error:
    raise ConfigError(
      "router",
      text,
      f"fails for logits of {tokens} tokens and {experts} experts: {type(error).__name__}: "
      f"{shorten(str(error))}",
    ) from error
  return "no" if bool(jnp.all(before == after)) else "yes"
