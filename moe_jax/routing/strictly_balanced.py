"""Strictly balanced gating, with equal loads in training (Shazeer 2017, appendix F)."""

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
  """Lets each expert keep its m best tokens in training and those above a threshold in evaluation.

  The threshold of each expert is learned.

  Paper: Outrageously Large Neural Networks (Shazeer et al. 2017, arXiv 1701.06538) appendix F.

      G(x)_i = G_sigma(x)_i M_i / sum_j G_sigma(x)_j M_j,  G_sigma(x) = softmax(x W_g)
      training:  M_batchwise(X, m)_{x,i} = 1 if G_sigma(x)_i is among expert i's m largest, else 0
                 m = k|X|/n
      otherwise: M_threshold(x, T)_i = 1 if G_sigma(x)_i > T_i, else 0

  The paper's X and n are the group's S rows and E here. T is `context.threshold`, which
  `threshold_loss` trains. The gates are computed as the softmax of the logits of a token's experts,
  which equals the quotient above but avoids a sum that may underflow. A token may be kept by no
  expert, or by all. Among equal G_sigma, the earlier token comes first. m is computed from all S
  rows, including padding, so that it is static.

  Reads `context.train`, `context.valid` and, outside training, `context.threshold`.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding is never chosen. Places that no real token fills name no expert.
    k: The mean number of experts per token, in [1, E]. m is rounded and clipped to [1, S].

  Returns:
    In training, a plan with A = E*m assignments, expert by expert, best token first. Otherwise a
    plan with A = E*S assignments, expert by expert, tokens by position. Gates are in [0, 1] and sum
    to 1 over the experts of a token that has any.

  Raises:
    ConfigError: If k is outside [1, E].
    ValueError: If `context.threshold` is None outside training.
  """
  num_tokens, num_experts = logits.shape
  check_k("strictly_balanced", k, num_experts)
  logits = logits.astype(jnp.float32)
  probs = jax.nn.softmax(logits, axis=-1)
  if context.train:
    # The shapes are [E, m] and [S, E].
    token, mask = _batchwise(jax.nn.log_softmax(logits, axis=-1), context.valid, k)
  else:
    token = jnp.broadcast_to(jnp.arange(num_tokens), (num_experts, num_tokens))
    mask = _above(probs, learned("strictly_balanced", context, "threshold"), context.valid)
  expert = jnp.broadcast_to(jnp.arange(num_experts)[:, None], token.shape)
  is_kept = mask[token, expert]
  gate = jnp.where(is_kept, _renormalised(logits, mask)[token, expert], 0.0)
  return RoutingPlan(
    token=token.reshape(-1),
    expert=jnp.where(is_kept, expert, num_experts).reshape(-1),
    gate=gate.reshape(-1),
    num_experts=num_experts,
  )


def threshold_loss(
  logits: Float[Array, "S E"], threshold: Float[Array, "E"], valid: Bool[Array, "S"] | None, k: int
) -> Float[Array, ""]:
  """Returns the loss that trains the thresholds to agree with the batch-wise mask.

  Paper: Outrageously Large Neural Networks (Shazeer et al. 2017, arXiv 1701.06538) appendix F.

      L = sum_x sum_i (M_threshold(x, T)_i - M_batchwise(X, m)_{x,i}) (X_{x,i} - T_i),  X = G_sigma

  Only T gets gradient. That of T_i is m minus the number of tokens above T_i, divided by the number
  of tokens, so that gradient descent raises T_i if too many tokens pass.

  Args:
    logits: Router outputs of one group.
    threshold: The thresholds T.
    valid: True for real tokens. None means that all tokens are real.
    k: The mean number of experts per token, as in `strictly_balanced`.

  Returns:
    The loss, which is at least 0 and is 0 if both masks agree.

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
  """Returns the m best tokens of each expert, [E, m], and M_batchwise without padding, [S, E].

  Tokens are ranked by the logarithm of G_sigma, which does not underflow.
  """
  num_tokens, num_experts = log_probs.shape
  m = slots("strictly_balanced", k, num_tokens, num_experts, "experts per token", field="k")
  valid = jnp.ones(num_tokens, bool) if valid is None else valid
  _, token = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(valid, log_probs.T, -jnp.inf)), m)
  mask = (
    jnp.zeros(log_probs.shape, bool).at[token, jnp.arange(num_experts)[:, None]].set(valid[token])
  )
  return token, mask


def _above(probs, threshold, valid):
  """Returns M_threshold without padding, [S, E]."""
  above = probs > threshold
  return above if valid is None else above & valid[:, None]


def _renormalised(logits, mask):
  """Returns G_sigma M divided by the sum of G_sigma M over experts, [S, E].

  The result is finite but meaningless for a token without experts.
  """
  return jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1)


# In training, the tokens of a group compete for the same places, whatever the capacity.
ROUTER = Router(strictly_balanced, "yes", learned=("threshold",))
