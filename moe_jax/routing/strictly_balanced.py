"""Strictly balanced gating: in training every expert gets equally many tokens (Shazeer 2017,
appendix F)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.routing.learned import learned
from moe_jax.routing.options import Count, check_k, slots
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router


def strictly_balanced(
  logits: Float[Array, "S E"], context: RoutingContext, *, k: Count = 4
) -> RoutingPlan:
  """Each expert keeps its m best tokens in training, and the tokens above a learned threshold
  outside it.

  Paper: Outrageously Large Neural Networks (Shazeer et al. 2017, arXiv 1701.06538) appendix F.

      G(x)_i = G_sigma(x)_i M_i / sum_j G_sigma(x)_j M_j,  G_sigma(x) = softmax(x W_g)
      training: M_batchwise(X, m)_{x,i} = 1 if G_sigma(x)_i is among the m largest of expert i, else
        0,  m = k|X|/n
      else:     M_threshold(x, T)_i = 1 if G_sigma(x)_i > T_i, else 0

  The paper's X and n are the group's S rows and E; T is `context.threshold`, which `threshold_loss`
  trains. Gates are the softmax of the logits that a token keeps, which is the quotient without a
  sum that may underflow. A token may be kept by no expert, or by all. Equal G_sigma go to the
  earlier token. Reads `context.train` and `context.valid`; in training no threshold. m is counted
  over all S rows, padding included, so that it is static.

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: `valid` is read: padding is never chosen; places that no real token fills name nobody.
    k: mean experts a token, in [1, E]; m is rounded and clipped to [1, S].

  Returns:
    In training a plan of A = E*m assignments, expert by expert, best token first; else of A = E*S,
      expert by expert,
    tokens by position. Gates in [0, 1], which sum to 1 over the experts of a token that has any.

  Raises:
    ConfigError: k outside [1, E].
    ValueError: outside training, and `context.threshold` is None.
  """
  num_tokens, num_experts = logits.shape
  check_k("strictly_balanced", k, num_experts)
  logits = logits.astype(jnp.float32)
  probs = jax.nn.softmax(logits, axis=-1)
  if context.train:
    token, mask = _batchwise(
      jax.nn.log_softmax(logits, axis=-1), context.valid, k
    )  # [E, m], [S, E]
  else:
    token = jnp.broadcast_to(jnp.arange(num_tokens), (num_experts, num_tokens))
    mask = _above(probs, learned("strictly_balanced", context, "threshold"), context.valid)
  expert = jnp.broadcast_to(jnp.arange(num_experts)[:, None], token.shape)
  kept = mask[token, expert]
  gate = jnp.where(kept, _renormalised(logits, mask)[token, expert], 0.0)
  return RoutingPlan(
    token=token.reshape(-1),
    expert=jnp.where(kept, expert, num_experts).reshape(-1),
    gate=gate.reshape(-1),
    num_experts=num_experts,
  )


def threshold_loss(
  logits: Float[Array, "S E"], threshold: Float[Array, "E"], valid: Bool[Array, "S"] | None, k: int
) -> Float[Array, ""]:
  """What trains T until the threshold keeps the tokens that the batch-wise mask keeps (Shazeer
  2017, appendix F).

      L = sum_x sum_i (M_threshold(x, T)_i - M_batchwise(X, m)_{x,i}) (X_{x,i} - T_i),  X = G_sigma

  Only T gets gradient: (m - tokens above T_i) over tokens, so descent raises T_i where too many
  pass.

  Args:
    logits: router outputs of one group.
    threshold: T.
    valid: which tokens are real; None: all.
    k: as in `strictly_balanced`.

  Returns:
    At least 0; 0 where both masks agree.

  Deviation: the paper's sum over tokens is a mean over real tokens here, so that it does not grow
  with the batch.
  """
  log_probs = jax.lax.stop_gradient(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1))
  probs = jnp.exp(log_probs)
  real = jnp.ones(logits.shape[0], bool) if valid is None else valid
  _, batchwise = _batchwise(log_probs, valid, k)
  excess = _above(probs, threshold, valid).astype(jnp.float32) - batchwise
  return jnp.sum(excess * (probs - threshold)) / jnp.maximum(jnp.sum(real), 1)


def _batchwise(log_probs, valid, k):
  """The m best tokens of each expert, [E, m], and M_batchwise without padding, [S, E].

  By the logarithms of G_sigma, which do not underflow.
  """
  num_tokens, num_experts = log_probs.shape
  m = slots("strictly_balanced", k, num_tokens, num_experts, "experts a token", field="k")
  valid = jnp.ones(num_tokens, bool) if valid is None else valid
  _, token = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(valid, log_probs.T, -jnp.inf)), m)
  mask = (
    jnp.zeros(log_probs.shape, bool).at[token, jnp.arange(num_experts)[:, None]].set(valid[token])
  )
  return token, mask


def _above(probs, threshold, valid):
  """M_threshold without padding, [S, E]."""
  above = probs > threshold
  return above if valid is None else above & valid[:, None]


def _renormalised(logits, mask):
  """G_sigma M / sum of G_sigma M, [S, E]; for a token without experts something finite."""
  return jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)


# In training a group's tokens compete for the same places, whatever the capacity.
ROUTER = Router(strictly_balanced, "yes", learned=("threshold",))
