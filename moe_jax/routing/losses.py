"""Auxiliary losses of one group: functions of (logits, plan), float32, in which padding counts for
nothing.

`vmap` over groups, then `over_groups`, which weighs each group by its real tokens so that padding
cannot move the mean.

Each loss has one value at perfect balance and another at collapse, where all tokens choose the same
K experts and P lies on them alone:

| loss                | perfect balance            | collapse                                      |
|---------------------|----------------------------|-----------------------------------------------|
| balance, "top_1"    | 1                          | E (K = 1)                                     |
| balance, "all"      | 1                          | E/K                                           |
| device              | 1                          | D, if the K experts are on one of D devices   |
| communication       | 1 (M of D devices a token) | D/M                                           |
| z                   | (ln E)^2 for zero logits   | (largest logit)^2                             |
| importance          | 0                          | E - 1 (P on one expert)                       |
| importance of gates | 0                          | E - 1 (one gate), E/K - 1 (K equal gates)     |
| load                | 0                          | E/K - 1                                       |
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.routing.plan import RoutingPlan

LEAST_NOISE = 1e-6  # sigma of the load loss, in units of logits
_CERTAIN = 40.0  # standard deviations


def balance_terms(
  logits: Float[Array, "S E"],
  plan: RoutingPlan,
  valid: Bool[Array, "S"] | None,
  counts: str,
  scores: str = "softmax",
) -> tuple[Float[Array, "E"], Float[Array, "E"]]:
  """f and P of the balance loss (Switch Eqs. 5 and 6), apart so that they can be averaged before
  they are multiplied.

      f_i = share of the choices that fall on expert i
      P_i = mean over real tokens of the token's score of expert i

  Args:
    logits: of one group.
    plan: as the router returns it: before capacity, or the loss saturates where an expert
      overflows.
    valid: which tokens are real; None: all.
    counts: "top_1": f counts each token's most probable expert, whatever the plan (GShard's c_e/S,
      Switch, ST-MoE); "all": f counts all of the plan's assignments, divided by their number, so
      that it sums to 1 at any K (as DeepSeekMoE scales it; flaxformer's and Hugging Face's losses
      are K times as large).
    scores: a key of `SCORES`: "softmax", or "sigmoid" divided by its sum over experts (DeepSeek-V3
      Eqs. 18 to 20).

  Returns:
    (f, P), each summing to 1 (to 0 if no token is real); f carries no gradient.
  """
  num_experts = logits.shape[-1]
  weight = _weights(logits, valid)
  if counts == "top_1":
    counted = _mean(jax.nn.one_hot(jnp.argmax(logits, axis=-1), num_experts), weight)
  elif counts == "all":
    named = jnp.sum(jax.nn.one_hot(plan.expert, num_experts), axis=0)  # one_hot(E) is all zeros
    counted = named / jnp.maximum(jnp.sum(named), 1.0)
  else:
    raise ValueError(f"counts={counts!r}: must be top_1 or all")
  return counted, _mean(SCORES[scores](logits), weight)


def communication_terms(
  logits: Float[Array, "S E"],
  plan: RoutingPlan,
  valid: Bool[Array, "S"] | None,
  devices: int,
  devices_a_token: int,
) -> tuple[Float[Array, "D"], Float[Array, "D"]]:
  """f'' and P'' of DeepSeek-V2's communication loss (arXiv 2405.04434 Eqs. 29 to 31), for
  `balance`.

      f''_d = 1/(M T) sum_t 1(token t is sent to device d)
      P''_d = sum of P_j over the experts j of device d

  D * sum_d f''_d P''_d is the paper's loss without alpha_3: 1 if tokens go to M devices evenly, D/M
  if all go to the same M.

  Args:
    logits: of one group.
    plan: before capacity.
    valid: which tokens are real; None: all.
    devices: D, groups of E/D consecutive experts.
    devices_a_token: M, to how many of them a token may be sent.
  """
  num_tokens, num_experts = logits.shape
  weight = _weights(logits, valid)
  visits = jnp.zeros((num_tokens, num_experts)).at[plan.token, plan.expert].set(1.0, mode="drop")
  sent = jnp.max(visits.reshape(num_tokens, devices, -1), axis=-1)  # [S, D]
  return _mean(sent, weight) / devices_a_token, by_device(_mean(_probs(logits), weight), devices)


def by_device(values: Float[Array, "E"], devices: int) -> Float[Array, "D"]:
  """Sums over each device's E/D consecutive experts: of f and P, DeepSeekMoE's L_DevBal (Eqs. 15 to
  17) for `balance`."""
  return jnp.sum(values.reshape(devices, -1), axis=-1)


def balance(f: Float[Array, "E"], p: Float[Array, "E"]) -> Float[Array, ""]:
  """E * sum_i f_i P_i (Switch Eq. 4 without alpha; GShard's l_aux times E^2). 1 at balance, E at
  collapse."""
  return f.shape[-1] * jnp.sum(jax.lax.stop_gradient(f) * p)


def z(logits: Float[Array, "S E"], valid: Bool[Array, "S"] | None) -> Float[Array, ""]:
  """Mean over real tokens of (log sum_e exp x_e)^2 (ST-MoE Eq. 5). At least 0; (ln E)^2 for zero
  logits."""
  log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
  return _mean(jnp.square(log_z), _weights(logits, valid))


def importance(logits: Float[Array, "S E"], valid: Bool[Array, "S"] | None) -> Float[Array, ""]:
  """CV^2 over experts of the sum over tokens of softmax(logits) (Shazeer 2017 Eqs. 6 and 7). In [0,
  E - 1].

  Deviation: Shazeer sums the gates kept by the top-K, see `gate_importance`; this sums all
  probabilities, as in V-MoE. At K = 1 those gates are the constant 1, which has no gradient.
  """
  return squared_variation(_mean(_probs(logits), _weights(logits, valid)))


def gate_importance(plan: RoutingPlan) -> Float[Array, ""]:
  """CV^2 over experts of the sum of their gates (Shazeer 2017 Eqs. 6 and 7). In [0, E - 1].

  LLaMA-MoE's unbiased variance makes it E/(E - 1) times this.
  """
  return squared_variation(jnp.zeros(plan.num_experts).at[plan.expert].add(plan.gate, mode="drop"))


def load(
  logits: Float[Array, "S E"],
  noisy_logits: Float[Array, "S E"],
  valid: Bool[Array, "S"] | None,
  k: int,
  noise_std: float | Float[Array, "S E"],
) -> Float[Array, ""]:
  """CV^2 over experts of the smooth load (Shazeer 2017, appendix A, Eqs. 8 to 11; V-MoE's load
  loss).

      P(x, i) = Phi((x_i - kth_excluding(H(x), k, i)) / sigma),  Load_i = sum_x P(x, i)

  P is the probability that expert i is among the top K if the noise on its logit is drawn anew.

  Args:
    logits: x, before noise.
    noisy_logits: H(x), by which experts were chosen; `logits` itself where there is no noise.
    valid: which tokens are real; None: all.
    k: K, experts a token, in [1, E].
    noise_std: sigma, > 0, in units of logits. Shazeer: softplus(x W_noise); V-MoE: 1/E.

  Returns:
    0 at balance, E/K - 1 where all tokens go to the same K experts without doubt; at most that for
      any logits.
  """
  chosen = chosen_probability(logits, noisy_logits, k, noise_std)
  return squared_variation(_mean(chosen, _weights(logits, valid)))


def chosen_probability(
  logits: Float[Array, "*S E"],
  noisy: Float[Array, "*S E"],
  k: int,
  noise_std: float | Float[Array, "*S E"],
) -> Float[Array, "*S E"]:
  """P(x, i) of `load`, in [0, 1], for the arguments of `load` with any leading axes; 1 for every
  expert at K = E."""
  logits, noisy = logits.astype(jnp.float32), noisy.astype(jnp.float32)
  if k == logits.shape[-1]:
    return jnp.ones_like(logits)
  top, index = jax.lax.top_k(noisy, k + 1)
  # By index: a compiler may compute H(x) twice, so that an expert is not equal to itself in the
  # last bit.
  is_in = jnp.any(index[..., :k, None] == jnp.arange(logits.shape[-1]), axis=-2)
  kth_excluding = jnp.where(is_in, top[..., k, None], top[..., k - 1, None])
  # The derivative goes with 1/sigma^2, which overflows where learned noise has died out. Below the
  # floor, and further out than float32 can tell the probability from 0 or 1, it is 0, which is its
  # limit.
  deviations = (logits - kth_excluding) / jnp.maximum(noise_std, LEAST_NOISE)
  return jax.scipy.stats.norm.cdf(jnp.clip(deviations, -_CERTAIN, _CERTAIN))  # Eq. 9


def over_groups(
  values: Float[Array, "G *rest"],
  valid: Bool[Array, "G S"] | None,
  tokens: Float[Array, ""] | None = None,
) -> Float[Array, "*rest"]:
  """The mean over groups of a per-group loss (or of f or P), each group weighing as many real
  tokens as it has.

  Where the groups are a microbatch's, `tokens` is the number of real tokens in all microbatches:
  the result is then this microbatch's part of the batch's mean, and the parts add up to it.
  """
  if valid is None:
    return jnp.mean(values, axis=0)
  weight = jnp.sum(valid, axis=-1, dtype=jnp.float32)
  if tokens is None:
    return _mean(values, weight)
  return jnp.tensordot(weight, values, axes=1) / jnp.maximum(tokens, 1.0)


def squared_variation(x: Float[Array, "..."]) -> Float[Array, ""]:
  """CV^2 of non-negative x with the population variance; 0, with zero gradient, where all x are
  0."""
  # A common factor changes nothing, and without it the square of a small mean would underflow.
  mean = jax.lax.stop_gradient(jnp.mean(x))
  x = x / jnp.where(mean > 0, mean, 1.0)
  return jnp.var(x) / jnp.square(jnp.where(mean > 0, jnp.mean(x), 1.0))


def _probs(logits):
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def _sigmoid_shares(logits):
  # The softmax of log s_i is s_i / sum_j s_j, without the division by a sum that may underflow.
  return jax.nn.softmax(jax.nn.log_sigmoid(logits.astype(jnp.float32)), axis=-1)


# What P of the balance loss averages.
SCORES = {"softmax": _probs, "sigmoid": _sigmoid_shares}


def _weights(logits, valid):
  return jnp.ones(logits.shape[0]) if valid is None else valid.astype(jnp.float32)


def _mean(values, weight):
  """Weighted mean over the first axis; 0 if there is no weight."""
  return jnp.tensordot(weight, values, axes=1) / jnp.maximum(jnp.sum(weight), 1.0)
