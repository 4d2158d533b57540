"""Auxiliary losses of routing, as float32 functions of the logits and plan of one group.

Padding has no influence on them. To get the loss of a batch, map a function over groups with
`jax.vmap` and average the results with `over_groups`, which weights each group by its number of
real tokens.

The table shows the value of each loss at perfect balance and at collapse, where all tokens choose
the same K experts and P is concentrated on them:

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
| sparsity            | a token's summed gates     | E/K times a token's summed gates              |
| similarity          | 0 for orthonormal columns  | E^2 - E for E equal columns of length 1       |
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.routing.plan import RoutingPlan
from moe_jax.routing.scored_top_k import log_sqrt_softplus

LEAST_NOISE = 1e-6  # lower bound of sigma in the load loss, in units of logits
# The number of standard deviations beyond which a probability is 0 or 1 in float32.
_CERTAIN = 40.0


def balance_terms(
  logits: Float[Array, "S E"],
  plan: RoutingPlan,
  valid: Bool[Array, "S"] | None,
  counts: str,
  scores: str = "softmax",
) -> tuple[Float[Array, "E"], Float[Array, "E"]]:
  """Returns f and P of the balance loss (Switch Eqs. 5 and 6).

  They are returned separately so that a caller can average them before it multiplies them.

      f_i = share of the choices that fall on expert i
      P_i = mean over real tokens of the token's score of expert i

  Args:
    logits: Router outputs of one group.
    plan: The plan as the router returns it, before capacity is applied. Otherwise the loss would
      saturate when an expert overflows.
    valid: True for real tokens. None means that all tokens are real.
    counts: The definition of f. "top_1" counts the most probable expert of each token and ignores
      the plan (GShard's c_e/S, Switch, ST-MoE). "all" counts all assignments of the plan and
      divides by their number, so that f sums to 1 at any K (as DeepSeekMoE scales it; flaxformer's
      and Hugging Face's losses are K times as large).
    scores: The definition of P, a key of `SCORES`. "softmax" averages probabilities. "sigmoid"
      averages sigmoids divided by their sum over experts (DeepSeek-V3 Eqs. 18 to 20), and
      "sqrt_softplus" likewise (DeepSeek-V4).

  Returns:
    (f, P), each of which sums to 1, or to 0 if no token is real. f carries no gradient.

  Raises:
    ValueError: If counts is neither "top_1" nor "all".
  """
  num_experts = logits.shape[-1]
  weight = _weights(logits, valid)
  if counts == "top_1":
    counted = _mean(jax.nn.one_hot(jnp.argmax(logits, axis=-1), num_experts), weight)
  elif counts == "all":
    # An assignment to no expert has index E, whose one-hot vector is all zeros.
    assigned = jnp.sum(jax.nn.one_hot(plan.expert, num_experts), axis=0)
    counted = assigned / jnp.maximum(jnp.sum(assigned), 1.0)
  else:
    raise ValueError(f"counts={counts!r}: must be 'top_1' or 'all'")
  return counted, _mean(SCORES[scores](logits), weight)


def communication_terms(
  logits: Float[Array, "S E"],
  plan: RoutingPlan,
  valid: Bool[Array, "S"] | None,
  devices: int,
  devices_a_token: int,
) -> tuple[Float[Array, "D"], Float[Array, "D"]]:
  """Returns f'' and P'' of DeepSeek-V2's communication loss (arXiv 2405.04434 Eqs. 29 to 31).

      f''_d = 1/(M T) sum_t 1(token t is sent to device d)
      P''_d = sum of P_j over the experts j of device d

  With these arguments, `balance` returns D * sum_d f''_d P''_d, which is the paper's loss without
  alpha_3. It is 1 if tokens go to M devices each and all devices get equally many, and D/M if all
  tokens go to the same M devices.

  Args:
    logits: Router outputs of one group.
    plan: The plan before capacity is applied.
    valid: True for real tokens. None means that all tokens are real.
    devices: The number of devices, D. Each holds E/D consecutive experts.
    devices_a_token: The number of devices to which a token may be sent, M.

  Returns:
    (f'', P''), one entry per device.
  """
  num_tokens, num_experts = logits.shape
  weight = _weights(logits, valid)
  visits = jnp.zeros((num_tokens, num_experts)).at[plan.token, plan.expert].set(1.0, mode="drop")
  sent = jnp.max(visits.reshape(num_tokens, devices, -1), axis=-1)  # [S, D]
  return _mean(sent, weight) / devices_a_token, by_device(_mean(_probs(logits), weight), devices)


def similarity(matrix: Float[Array, "D E"]) -> Float[Array, ""]:
  """Returns SimBal's loss of a router's matrix R, ||R^T R - I||_1 (arXiv 2506.14038).

  It is 0 if the columns of R are orthonormal. Logits then have the dot products of the tokens'
  projections, so that similar tokens get similar experts. The norm is the sum of absolute entries.
  It uses neither tokens nor assignments.

  Deviation: the paper starts R as an orthogonal matrix. Here it starts small, and the loss makes it
  orthogonal.

  Args:
    matrix: R, with one column for each expert.
  """
  product = jnp.matmul(matrix.T, matrix, precision=jax.lax.Precision.HIGHEST)
  return jnp.sum(jnp.abs(product - jnp.eye(matrix.shape[-1])))


def by_device(values: Float[Array, "E"], devices: int) -> Float[Array, "D"]:
  """Sums values over the E/D consecutive experts of each device.

  `balance` of the sums of f and P is DeepSeekMoE's L_DevBal (Eqs. 15 to 17).
  """
  return jnp.sum(values.reshape(devices, -1), axis=-1)


def balance(f: Float[Array, "E"], p: Float[Array, "E"]) -> Float[Array, ""]:
  """Returns E * sum_i f_i P_i (Switch Eq. 4 without alpha; GShard's l_aux times E^2).

  It is 1 at balance and E at collapse to one expert.
  """
  return f.shape[-1] * jnp.sum(jax.lax.stop_gradient(f) * p)


def z(logits: Float[Array, "S E"], valid: Bool[Array, "S"] | None) -> Float[Array, ""]:
  """Returns the mean over real tokens of (log sum_e exp x_e)^2 (ST-MoE Eq. 5).

  It is at least 0, and (ln E)^2 if all logits are 0.
  """
  log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
  return _mean(jnp.square(log_z), _weights(logits, valid))


def sparsity_terms(
  plan: RoutingPlan, valid: Bool[Array, "S"] | None, num_tokens: int, k: int
) -> tuple[Float[Array, "E"], Float[Array, "E"]]:
  """Returns f and P of ReMoE's L1 loss with load balancing (arXiv 2412.14711 Eq. 10).

      f_i = 1/(k T) sum_t 1(g_ti > 0),  P_i = 1/T sum_t g_ti

  With these, `balance` is E sum_i f_i P_i, the paper's loss of one layer without its weight lambda.

  Args:
    plan: The plan before capacity is applied. f carries no gradient.
    valid: True for real tokens. None means that all tokens are real.
    num_tokens: The number of tokens of the group, S.
    k: The number of experts per token that the loss aims at.
  """
  tokens = num_tokens if valid is None else jnp.maximum(jnp.sum(valid), 1)
  active = jnp.zeros(plan.num_experts).at[plan.expert].add(1.0, mode="drop")
  gates = jnp.zeros(plan.num_experts).at[plan.expert].add(plan.gate, mode="drop")
  return active / (k * tokens), gates / tokens


def importance(logits: Float[Array, "S E"], valid: Bool[Array, "S"] | None) -> Float[Array, ""]:
  """Returns CV^2 over experts of softmax(logits) summed over tokens (Shazeer 2017 Eqs. 6 and 7).

  It is in [0, E - 1].

  Deviation: Shazeer et al. sum the gates of the K chosen experts, see `gate_importance`. This
  function sums all probabilities, as V-MoE does. At K = 1 those gates are the constant 1, which has
  no gradient.
  """
  return squared_variation(_mean(_probs(logits), _weights(logits, valid)))


def gate_importance(plan: RoutingPlan) -> Float[Array, ""]:
  """Returns CV^2 over experts of the sum of their gates (Shazeer 2017 Eqs. 6 and 7).

  It is in [0, E - 1]. LLaMA-MoE uses the unbiased variance, so that its loss is E/(E - 1) times
  this.
  """
  return squared_variation(jnp.zeros(plan.num_experts).at[plan.expert].add(plan.gate, mode="drop"))


def load(
  logits: Float[Array, "S E"],
  noisy_logits: Float[Array, "S E"],
  valid: Bool[Array, "S"] | None,
  k: int,
  noise_std: float | Float[Array, "S E"],
) -> Float[Array, ""]:
  """Returns CV^2 of the smooth load (Shazeer 2017, appendix A, Eqs. 8 to 11; V-MoE's load loss).

      P(x, i) = Phi((x_i - kth_excluding(H(x), k, i)) / sigma),  Load_i = sum_x P(x, i)

  P is the probability that expert i is among the top K if the noise on its logit is drawn again.

  Args:
    logits: The logits x before noise.
    noisy_logits: The logits H(x) by which experts were chosen. Without noise, pass `logits`.
    valid: True for real tokens. None means that all tokens are real.
    k: The number of experts per token, K, in [1, E].
    noise_std: The standard deviation of the noise, sigma > 0, in units of logits. It is softplus(x
      W_noise) in Shazeer et al. and 1/E in V-MoE.

  Returns:
    0 at balance; E/K - 1 if all tokens are certain to go to the same K experts, which is the
    maximum for any logits.
  """
  chosen = chosen_probability(logits, noisy_logits, k, noise_std)
  return squared_variation(_mean(chosen, _weights(logits, valid)))


def chosen_probability(
  logits: Float[Array, "*S E"],
  noisy: Float[Array, "*S E"],
  k: int,
  noise_std: float | Float[Array, "*S E"],
) -> Float[Array, "*S E"]:
  """Returns P(x, i) of `load`, the probability that expert i is chosen if its noise is redrawn.

  For the arguments see `load`; they may have any leading axes. The result is in [0, 1]. At K = E it
  is 1 for every expert.
  """
  logits, noisy = logits.astype(jnp.float32), noisy.astype(jnp.float32)
  if k == logits.shape[-1]:
    return jnp.ones_like(logits)
  top, index = jax.lax.top_k(noisy, k + 1)
  # Membership in the top K is decided by index and not by comparing values: a compiler may compute
  # H(x) twice with different rounding, so that an expert's value differs from itself.
  is_in = jnp.any(index[..., :k, None] == jnp.arange(logits.shape[-1]), axis=-2)
  kth_excluding = jnp.where(is_in, top[..., k, None], top[..., k - 1, None])
  # The derivative grows with 1/sigma^2, which overflows where learned noise has vanished. The floor
  # and the clip make it 0, which is its limit, for very small sigma and where float32 cannot
  # distinguish the probability from 0 or 1.
  deviations = (logits - kth_excluding) / jnp.maximum(noise_std, LEAST_NOISE)
  return jax.scipy.stats.norm.cdf(jnp.clip(deviations, -_CERTAIN, _CERTAIN))  # Eq. 9


def over_groups(
  values: Float[Array, "G *rest"],
  valid: Bool[Array, "G S"] | None,
  tokens: Float[Array, ""] | None = None,
) -> Float[Array, "*rest"]:
  """Returns the mean over groups of a per-group value, weighted by the number of real tokens.

  Args:
    values: A loss, f or P of each group.
    valid: True for real tokens. None means that all tokens are real.
    tokens: The number of real tokens in all microbatches of the batch, if the groups are those of
      one microbatch. The result is then the contribution of this microbatch to the mean of the
      batch, and the contributions of all microbatches add up to it. It is not read if `valid` is
      None.
  """
  if valid is None:
    return jnp.mean(values, axis=0)
  weight = jnp.sum(valid, axis=-1, dtype=jnp.float32)
  if tokens is None:
    return _mean(values, weight)
  return jnp.tensordot(weight, values, axes=1) / jnp.maximum(tokens, 1.0)


def squared_variation(x: Float[Array, "..."]) -> Float[Array, ""]:
  """Returns CV^2 of non-negative x, with the population variance.

  If all x are 0, it is 0 with zero gradient.
  """
  # CV^2 is invariant to a common factor. Dividing by the mean first keeps the square of a small
  # mean from underflowing.
  mean = jax.lax.stop_gradient(jnp.mean(x))
  x = x / jnp.where(mean > 0, mean, 1.0)
  return jnp.var(x) / jnp.square(jnp.where(mean > 0, jnp.mean(x), 1.0))


def _probs(logits):
  """Returns the softmax of the logits in float32."""
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def _sigmoid_shares(logits):
  """Returns the sigmoids of the logits, divided by their sum over experts, in float32."""
  # The softmax of log s_i equals s_i / sum_j s_j. It avoids the division by a sum that may
  # underflow.
  return jax.nn.softmax(jax.nn.log_sigmoid(logits.astype(jnp.float32)), axis=-1)


def _root_shares(logits):
  """Returns sqrt(softplus(logits)), divided by its sum over experts, in float32."""
  return jax.nn.softmax(log_sqrt_softplus(logits.astype(jnp.float32)), axis=-1)


# The scores that P of the balance loss averages over tokens.
SCORES = {"softmax": _probs, "sigmoid": _sigmoid_shares, "sqrt_softplus": _root_shares}


def _weights(logits, valid):
  """Returns the weight of each token, which is 1 for real tokens and 0 for padding."""
  return jnp.ones(logits.shape[0]) if valid is None else valid.astype(jnp.float32)


def _mean(values, weight):
  """Returns the weighted mean over the first axis, or 0 if all weights are 0."""
  return jnp.tensordot(weight, values, axes=1) / jnp.maximum(jnp.sum(weight), 1.0)
