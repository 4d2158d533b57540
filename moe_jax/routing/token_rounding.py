"""Token rounding: the tokens of each expert fill whole tiles of a matrix product (SonicMoE)."""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.options import Bounds, OneOf
from moe_jax.routing.options import Count, check, check_k, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import select

Tile = Annotated[int, Bounds(1, 2**16, "rows of a tile of a matrix product")]
# Name -> how many of `tile` rows are added to a count before it is rounded down to whole tiles.
ROUNDINGS = {"nearest": lambda tile: tile // 2, "up": lambda tile: tile - 1, "down": lambda tile: 0}


def token_rounding(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 2,
  tile: Tile = 8,
  rounding: Annotated[str, OneOf(ROUNDINGS)] = "nearest",
) -> RoutingPlan:
  """Rounds the number of tokens of each expert to whole tiles, after each token took K experts.

  Paper: SonicMoE (2025, arXiv 2512.14080).

      P = softmax(logits),  T_t = TopK(P_t)
      f_i = number of tokens with i in T_t,  r_i = f_i rounded to a multiple of `tile`
      training:  expert i serves the first r_i tokens, those with i in T_t first, each by P_ti
      otherwise:  expert i serves the tokens with i in T_t
      y_t = sum of P_ti E_i(x_t) over the experts that serve t

  An expert loses its least probable tokens, or gets the most probable ones of the others, less than
  `tile` of either. Grouped products then compute no rows of padding on hardware with such tiles.
  Counts are those of a group, which should have all tokens that a device routes at once
  (`model.moe.group_rows`). Among equal probabilities, the earlier token comes first. If all real
  tokens of a group are too few for r_i, it is the largest multiple below.

  In training, whether an expert serves a token depends on later tokens, so that a causal model must
  allow it. In evaluation it does not.

  Reads `context.valid` and `context.train`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding is never served.
    k: The number of experts per token before rounding, in [1, E].
    tile: The rows of a tile, in training at most S. With 1 nothing is rounded. Products on the
      paper's GPUs have 128; experts should get several tiles of a group, or many get nothing.
    rounding: How counts are rounded. "nearest": halves are rounded up. "up": experts lose no token.
      "down": experts get no other token.

  Returns:
    A plan with room for A = S*K + E*c <= S*E assignments, where c is tile // 2 for "nearest", tile
    - 1 for "up" and 0 for "down", in order of tokens. Gates are in [0, 1].

  Raises:
    ConfigError: If k or tile is out of range, or the rounding is not known.

  Deviation: the paper has several ways to round, of which these are the plain ones. It is not known
  to us whether its gates are normalised over a token's experts; these are not.
  """
  name, (num_tokens, num_experts) = "token_rounding", logits.shape
  check_k(name, k, num_experts)
  check_name(name, "rounding", rounding, ROUNDINGS)
  if context.train:
    check(name, "tile", tile, tile <= num_tokens, f"at most the {num_tokens} tokens of a group")
  probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  chosen = jax.nn.one_hot(select(logits, k), num_experts, dtype=jnp.bool_).any(axis=1)
  valid = jnp.ones(num_tokens, bool) if context.valid is None else context.valid
  chosen &= valid[:, None]
  served = _rounded(chosen, probs, valid, tile, ROUNDINGS[rounding](tile))
  served = served if context.train else chosen
  room = min(num_tokens * k + num_experts * ROUNDINGS[rounding](tile), num_tokens * num_experts)
  # Pairs that are served come first, each kind in order.
  pair = jnp.argsort(~served.reshape(-1), stable=True)[:room]
  token, expert = jnp.divmod(pair, num_experts)
  real = served.reshape(-1)[pair]
  return RoutingPlan(
    token=token,
    expert=jnp.where(real, expert, num_experts),
    gate=jnp.where(real, probs.reshape(-1)[pair], 0.0),
    num_experts=num_experts,
  )


def _rounded(
  chosen: Bool[Array, "S E"],
  probs: Float[Array, "S E"],
  valid: Bool[Array, "S"],
  tile: int,
  added: int,
) -> Bool[Array, "S E"]:
  """Returns which token each expert serves, so many that they fill whole tiles.

  Args:
    chosen: Whether the token chose the expert.
    probs: The order in which an expert takes tokens of either kind.
    valid: Whether the token is real.
    tile: The rows of a tile.
    added: What is added to a count before it is rounded down.
  """
  count = jnp.sum(chosen, axis=0) + added
  wanted = jnp.minimum(count, jnp.sum(valid)) // tile * tile
  # Those who chose the expert have numbers above 1, the others at most 1, and padding has none.
  ranked = jax.lax.stop_gradient(jnp.where(valid[:, None], probs + 2 * chosen, -1.0))
  order = jnp.argsort(-ranked, axis=0, stable=True)
  return jnp.argsort(order, axis=0) < wanted


# In training, tokens compete for the places of an expert's tiles.
ROUTER = Router(token_rounding, "yes", average="k")
