"""Noisy top-K gating: learned noise on the logits, then a softmax over the K largest (Shazeer 2017,
LLaMA-MoE)."""

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
  """Each token picks the K experts of largest noisy logit and weighs them by a softmax over those K
  alone.

  Paper: Outrageously Large Neural Networks (Shazeer et al. 2017, arXiv 1701.06538) Eqs. 3 to 5;
  LLaMA-MoE (arXiv 2406.16554), with noise_floor 0.01.

      H(x)_i = (x W_g)_i + eps_i (softplus((x W_noise)_i) + noise_floor),  eps_i ~ N(0, 1)
      G(x) = softmax(KeepTopK(H(x), k)),  KeepTopK(v, k)_i = v_i if v_i is among the k largest of v,
                                          else -inf

  x W_g is `logits`, softplus(x W_noise) is `context.noise_std`. The noise is in the gates too,
  through which both get gradient. Without key or training H is `logits`. Equal H go to the expert
  of lower index. Reads `context.key`, `context.train`, `context.noise_std` (where noise is drawn),
  `context.valid` and `context.bias` (added to H for selection only; the paper has none).

  At K = 1 this paper's gate is the constant 1: the task's loss then gives the router a gradient of
  exactly zero.

  Args:
    logits: router outputs of one group; float32 arithmetic whatever their dtype.
    context: padding takes no expert: `expert` E and gate 0.
    k: experts a token, in [1, E].
    noise_floor: least standard deviation of the noise, >= 0; Shazeer: 0, LLaMA-MoE: 0.01.
    priority: who is served first, see `token_choice`; "gate" orders tokens by softmax(H), over all
      experts, of their first choice.

  Returns:
    A plan of A = K*S assignments, gates in [0, 1], which sum to 1 over the choices of a token.

  Raises:
    ConfigError: k outside [1, E]; noise_floor < 0; unknown priority.
    ValueError: noise is to be drawn, and `context.noise_std` is None.
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
  """H(x) (Eq. 4), by which `noisy_top_k` chooses: the same context draws the same noise."""
  drawn = context.train and context.key is not None
  noise_std = learned("noisy_top_k", context, "noise_std") + noise_floor if drawn else noise_floor
  return noise.perturb(logits, noise_std, context.key, context.train)  # Eq. 4


def load(
  logits: Float[Array, "S E"], context: RoutingContext, *, k: int, noise_floor: float = 0.0, **_
) -> Float[Array, ""]:
  """CV^2 over experts of the smooth load of `noisy_top_k` with these options and this context
  (appendix A).

  0 at balance, E/K - 1 where all tokens go to the same K experts without doubt. Other options play
  no part.
  """
  std = learned("noisy_top_k", context, "noise_std") + noise_floor
  return losses.load(logits, noisy_logits(logits, context, noise_floor), context.valid, k, std)


def keep_top_k(
  noisy: Float[Array, "*S E"], scores: Float[Array, "*S E"], k: int
) -> tuple[Int[Array, "*S K"], Float[Array, "*S K"]]:
  """The k experts of largest score, best first, and the softmax of their noisy logits alone (Eqs. 3
  and 5)."""
  _, expert = jax.lax.top_k(jax.lax.stop_gradient(scores), k)  # Eq. 5
  return expert, jax.nn.softmax(jnp.take_along_axis(noisy, expert, axis=-1), axis=-1)  # Eq. 3


ROUTER = Router(noisy_top_k, leak, learned=("noise_std",), smooth_load=load, reads_bias=True)
