"""SparseMixer: experts are sampled one after the other, with a gradient of the sampling (GRIN)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.routing.options import Count, NotNegative, check, check_k
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Leak, Router
from moe_jax.routing.token_choice import leak, token_choice

# The share of other experts than the most probable one whose output counts in full, and the factor
# on that of the rest: Heun's method of third order weighs the two ends of the step so.
_FULL, _REST = 0.25, 1 / 3


def sparse_mixer(
  logits: Float[Array, "S E"], context: RoutingContext, *, k: Count = 2, epsilon: NotNegative = 0.01
) -> RoutingPlan:
  """Routes each token to K experts that are sampled one after the other, without replacement.

  Paper: GRIN (Liu et al. 2024, arXiv 2409.12136), whose code is that of Phi-3.5-MoE.

      M_c = {i not chosen before : (m - x_i) / max(|x_i|, m) <= 2 epsilon},  m = largest such x_i
      p = softmax(x_i for i in M_c),  training: i_c ~ p,  otherwise: i_c = argmax p
      g_c = p_{i_c} r,  r = 1 if i_c = argmax p or u < 1/4, else 1/3;  otherwise: r = 1
      d g_c / d x = d p_{i_c} / d x
      y = sum_{c = 1..K} g_c E_{i_c}(x),  u ~ U(0, 1)

  Experts whose logit is far below the largest are left out of M_c. If one is left, its gate is 1,
  so that gates of a token usually add up to about K. In training, the gradient of the gate is that
  of the probability, as if r were 1: the experts' outputs at sampled points make it an estimate of
  the gradient of the expected output.

  Reads `context.key`, `context.train` and `context.valid`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding gets `expert` E and gate 0. Without a key nothing is sampled.
    k: The number of experts per token, K, in [1, E]. The paper has 2.
    epsilon: Half the width of M_c, relative to the largest logit.

  Returns:
    A plan with A = K*S assignments, first choices first, and gates in (0, 1].

  Raises:
    ConfigError: If k or epsilon is out of range.
  """
  name, num_experts = "sparse_mixer", logits.shape[-1]
  check_k(name, k, num_experts)
  check(name, "epsilon", epsilon, epsilon >= 0, ">= 0")
  logits = logits.astype(jnp.float32)
  keys = None
  if context.train and context.key is not None:
    keys = jax.random.split(context.key, 2 * k).reshape(k, 2)
  free, chosen, gates = jnp.ones(logits.shape, bool), [], []
  for c in range(k):
    kept = jax.lax.stop_gradient(_near_the_largest(logits, free, epsilon))
    probs = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    best = jnp.argmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    expert, factor = (best, 1.0) if keys is None else _sample(keys[c], logits, kept, best)
    gate = jnp.take_along_axis(probs, expert[:, None], axis=-1)[:, 0]
    gates.append(gate + jax.lax.stop_gradient((factor - 1.0) * gate))
    chosen.append(expert)
    free &= jnp.arange(num_experts) != expert[:, None]
  return token_choice(jnp.stack(chosen, axis=-1), jnp.stack(gates, axis=-1), context, num_experts)


def _near_the_largest(logits: Float[Array, "S E"], free: Array, epsilon: float) -> Array:
  """Returns which free experts have a logit that is not far below the largest of them, [S, E]."""
  largest = jnp.max(jnp.where(free, logits, -jnp.inf), axis=-1, keepdims=True)
  # Zero logits are all equally large. The published code would divide 0 by 0 there, and keep them.
  size = jnp.maximum(jnp.abs(logits), largest)
  near = largest - logits <= 2 * epsilon * size
  return free & near


def _sample(
  keys: Array, logits: Float[Array, "S E"], kept: Array, best: Int[Array, "S"]
) -> tuple[Int[Array, "S"], Float[Array, "S"]]:
  """Returns an expert of each token, drawn by the softmax of those that are kept, and its r."""
  noisy = logits + jax.random.gumbel(keys[0], logits.shape)
  expert = jnp.argmax(jnp.where(kept, noisy, -jnp.inf), axis=-1)
  in_full = (expert == best) | (jax.random.uniform(keys[1], best.shape) < _FULL)
  return expert, jnp.where(in_full, 1.0, _REST)


def _leak(k: int) -> Leak:
  """Returns the `Leak` of the router: that of token choice by choice."""
  return leak(k, "choice")


ROUTER = Router(sparse_mixer, _leak)
