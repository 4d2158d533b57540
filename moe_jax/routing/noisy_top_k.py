"""Noisy top-K gating, with learned noise on the logits (Shazeer 2017, LLaMA-MoE)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.routing import losses, noise
from moe_jax.routing.learned import learned
from moe_jax.routing.options import Count, NotNegative, check, check_k, check_name
from moe_jax.routing.plan import RoutingContext, RoutingPlan
from moe_jax.routing.router import Router
from moe_jax.routing.token_choice import PRIORITIES, leak, log_odds, token_choice


def noisy_top_k(
  logits: Float[Array, "S E"],
  context: RoutingContext,
  *,
  k: Count = 4,
  noise_floor: NotNegative = 0.0,
  priority: str = "choice",
) -> RoutingPlan:
  """Routes each token to the K experts with the largest noisy logits.

  The gates are a softmax over these K noisy logits alone.

  Paper: Outrageously Large Neural Networks (Shazeer et al. 2017, arXiv 1701.06538) Eqs. 3 to 5;
  LLaMA-MoE (arXiv 2406.16554), with noise_floor 0.01.

      H(x)_i = (x W_g)_i + eps_i (softplus((x W_noise)_i) + noise_floor),  eps_i ~ N(0, 1)
      G(x) = softmax(KeepTopK(H(x), k))
      KeepTopK(v, k)_i = v_i if v_i is among the k largest of v, else -inf

  Here x W_g is `logits` and softplus(x W_noise) is `context.noise_std`. The gates contain the
  noise, so that both the logits and the noise's standard deviation get gradient. Without a key, or
  outside training, H is `logits`. Among equal H, the expert with the lower index comes first. At
  K = 1 the paper's gate is the constant 1, so that the gradient of the task's loss with respect to
  the router is exactly zero.

  Reads `context.key`, `context.train`, `context.valid`, `context.noise_std` (when noise is drawn)
  and `context.bias`. The bias is added to H for selection only; the paper has none.

  Args:
    logits: Router outputs of one group. They are cast to float32.
    context: Padding gets `expert` E and gate 0.
    k: The number of experts per token, K, in [1, E].
    noise_floor: A constant that is added to the standard deviation of the noise, >= 0. Shazeer et
      al. use 0 and LLaMA-MoE uses 0.01.
    priority: The order in which assignments are served, see `token_choice`. "gate" orders tokens by
      the probability of their first choice in softmax(H) over all experts.

  Returns:
    A plan with A = K*S assignments and gates in [0, 1], which sum to 1 over the choices of a token.

  Raises:
    ConfigError: If k is outside [1, E], if noise_floor < 0, or if the priority is unknown.
    ValueError: If noise must be drawn but `context.noise_std` is None.
  """
  num_experts = logits.shape[-1]
  check_k("noisy_top_k", k, num_experts)
  check("noisy_top_k", "noise_floor", noise_floor, noise_floor >= 0, ">= 0")
  check_name("noisy_top_k", "priority", priority, PRIORITIES)
  noisy = noisy_logits(logits, context, noise_floor)
  expert, gate = keep_top_k(noisy, noisy if context.bias is None else noisy + context.bias, k)
  return token_choice(
    expert, gate, context, num_experts, priority=priority, score=log_odds(noisy, expert[:, 0])
  )


def noisy_logits(
  logits: Float[Array, "S E"], context: RoutingContext, noise_floor: float = 0.0
) -> Float[Array, "S E"]:
  """Returns H(x) of Eq. 4, by which `noisy_top_k` selects experts.

  The same context always draws the same noise.
  """
  is_noisy = context.train and context.key is not None
  noise_std = (
    learned("noisy_top_k", context, "noise_std") + noise_floor if is_noisy else noise_floor
  )
  return noise.perturb(logits, noise_std, context.key, context.train)  # Eq. 4


def load(
  logits: Float[Array, "S E"], context: RoutingContext, *, k: int, noise_floor: float = 0.0, **_
) -> Float[Array, ""]:
  """Returns CV^2 over experts of the smooth load of `noisy_top_k` (appendix A of Shazeer 2017).

  It is 0 at balance and E/K - 1 if all tokens are certain to go to the same K experts. The
  arguments are those of the router; its other options have no influence.
  """
  std = learned("noisy_top_k", context, "noise_std") + noise_floor
  return losses.load(logits, noisy_logits(logits, context, noise_floor), context.valid, k, std)


def keep_top_k(
  noisy: Float[Array, "*S E"], scores: Float[Array, "*S E"], k: int
) -> tuple[Int[Array, "*S K"], Float[Array, "*S K"]]:
  """Returns the k experts with the largest scores, best first, and their gates (Eqs. 3 and 5).

  The gates are the softmax of the noisy logits of these k experts alone.
  """
  _, expert = jax.lax.top_k(jax.lax.stop_gradient(scores), k)  # Eq. 5
  return expert, jax.nn.softmax(jnp.take_along_axis(noisy, expert, axis=-1), axis=-1)  # Eq. 3


def without_noise(logits: Float[Array, "*N E"], **_: object) -> Float[Array, "*N E"]:
  """Returns the logits, to whose noisy form the router adds the bias."""
  return logits.astype(jnp.float32)


ROUTER = Router(noisy_top_k, leak, learned=("noise_std",), smooth_load=load, biased=without_noise)
