"""What routers share that give some tokens more experts than others."""

from __future__ import annotations

from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.options import EXPERTS
from moe_jax.routing.options import check_k
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.token_choice import select, token_choice

# The option `most` of these routers: a static bound on the experts of a token; 0 means E.
Most = Annotated[int, EXPERTS]


def keep(
  router: str,
  chosen: Bool[Array, "S E"],
  scores: Float[Array, "S E"],
  gates: Float[Array, "S E"],
  context: RoutingContext,
  most: int,
) -> RoutingPlan:
  """Returns the plan in which each token goes to its chosen experts, but to at most `most`.

  Shapes must be static, so the plan has room for `most` experts of every token; the rest of the
  room names no expert and costs no work in dispatchers without a capacity. If more are chosen,
  those with the highest scores stay. A token's experts are served before those of later tokens, so
  nothing looks ahead.

  Args:
    router: The name of the router, for the error message.
    chosen: Whether the token wants the expert.
    scores: The order in which a token's experts are served.
    gates: The combine weights; the only argument that carries gradient.
    context: Padding chooses no expert.
    most: The bound, in [1, E]; 0 means E.

  Raises:
    ConfigError: If `most` is out of range.
  """
  num_experts = scores.shape[-1]
  if most:
    check_k(router, most, num_experts, field="most")
  expert = select(jnp.where(chosen, scores, -jnp.inf), most or num_experts)
  gate = jnp.take_along_axis(gates, expert, axis=-1)
  expert = jnp.where(jnp.take_along_axis(chosen, expert, axis=-1), expert, num_experts)
  return token_choice(expert, gate, context, num_experts, priority="token")
