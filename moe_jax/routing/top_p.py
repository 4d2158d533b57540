"""Top-p routing: as many experts as a token's probabilities need to add up to p."""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.options import Bounds
from moe_jax.routing.options import Count, check, check_k
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.variable import Most, keep

Probability = Annotated[float, Bounds(1e-6, 1, "a sum of probabilities")]


def top_p(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  p: Probability = 0.4,
  k: Count = 2,
  most: Most = 0,
) -> RoutingPlan:
  """Routes each token to its most probable experts until their probabilities add up to p.

  Paper: Harder Tasks Need More Experts (Huang et al. 2024, arXiv 2403.07652) Eqs. 4 to 6; with the
  rule mean_k, DTop-p (arXiv 2512.13996).

      P = softmax(logits),  P_(1) >= P_(2) >= ...
      t = min {n : P_(1) + ... + P_(n) >= p},  T = the t most probable experts
      y = sum_{i in T} P_i(x) E_i(x)

  A token that the router is sure of gets one expert. The paper's entropy loss
  (`model.moe.entropy_loss` = 1e-4) keeps probabilities from becoming even, which would let the
  number of experts grow.

  Reads `context.valid` and `context.bias`, whose mean is added to p. With
  `model.moe.balancing.rule` = mean_k a controller moves it so that tokens get k experts on average.
  Deviation: DTop-p is known to us from its abstract. It has a PI controller of one p for all
  layers, as here; the form of ours is our own, and its normalisation of each layer's logits is left
  out.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding gets no expert.
    p: The sum that the probabilities of a token's experts must reach, in (0, 1].
    k: The mean number of experts per token that the rule mean_k aims at, and that counts of
      activated parameters assume, in [1, E].
    most: At most so many experts per token, the most probable ones; 0 means E.

  Returns:
    A plan with A = S*most assignments and gates in [0, 1].

  Raises:
    ConfigError: If p, k or most is out of range.
  """
  num_experts = logits.shape[-1]
  check("top_p", "p", p, 0 < p <= 1, "in (0, 1]")
  check_k("top_p", k, num_experts)
  probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  wanted = p if context.bias is None else p + jnp.mean(context.bias)
  ordered = jnp.argsort(-jax.lax.stop_gradient(probs), axis=-1, stable=True)
  before = jnp.cumsum(jnp.take_along_axis(probs, ordered, axis=-1), axis=-1)
  before = jnp.concatenate([jnp.zeros_like(before[:, :1]), before[:, :-1]], axis=-1)
  # An expert is needed if those before it do not suffice. The first is, whatever p has become.
  needed = (before < wanted).at[:, 0].set(True)
  chosen = jnp.take_along_axis(needed, jnp.argsort(ordered, axis=-1), axis=-1)
  return keep("top_p", chosen, probs, probs, context, most)


ROUTER = Router(top_p, "no", average="k", rules=("mean_k",))
