"""Loss-free balancing: rules that move a bias of each expert until all get equally many tokens.

A router that reads `RoutingContext.bias` adds b_j to the score of expert j when it chooses experts,
and never to the gates, so that balancing has no gradient (DeepSeek-V3, arXiv 2412.19437). After
each step a rule computes the next b from the batch of that step. The next batch is routed with it,
so that no token's routing depends on later tokens of its own batch, and the model stays causal.

Notation: m real tokens of the batch, over all devices, choose k of E experts each. Expert j gets
c_j of these choices and lacks v_j = 1 - c_j E / (m k) of an even share. s_ij is the score of expert
j for token i to which the router adds b_j, and alpha_i is the (k+1)-th largest s_ij + b_j of token
i, which an expert must exceed to be chosen.

- `sign`: b + u sign(v) (arXiv 2408.15664, Algorithm 1; DeepSeek-V3).
- `centred_sign`: the same, minus its mean over experts.
- `proportional`: b + u v, which arXiv 2408.15664 compares with the sign.
- `pid`: u (sum of all v so far + p v + d (v - previous v)), a controller with three terms.
- `smebu`: b + u M with M <- a M + (1 - a) (t - mean t) and t = tanh(c v) (Trinity, arXiv
  2602.17004).
- `quantile`: q - mean q, where q_j is the k/E quantile over tokens of alpha_i - s_ij (Kimi K3
  report, Sec. 2.3.3). With b = q each expert would be chosen by k/E of the tokens, if the alpha
  stayed as they are.
- `quantile_histogram`: the same from a histogram, which devices and microbatches add up (appendix
  D of that report).
- `bip`: -q after some steps for the dual of the best balanced assignment (arXiv 2502.15451).

Three more rules are each for one router that gives tokens different numbers of experts (`relu`,
`expert_threshold` and `top_p`), and aim at k experts a token on average:

- `sparsity`: b + u sign(assignments - m k), over all layers; the loss of ReMoE is multiplied by
  exp(b) (arXiv 2412.14711 Eq. 9).
- `expert_quantile`: (1 - u) b - u (the 1 - k/E quantile over tokens of s_ij) (arXiv 2603.11535).
- `mean_k`: u (sum of all e so far + p e), e = 1 - assignments / (m k) over all layers, which is
  added to the probability p of `top_p` (after DTop-p, arXiv 2512.13996).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_jax.options import NOT_NEGATIVE, Bounds, OneOf, Options, option

# The state of a rule: "bias" and the arrays of `Rule.memory`, each [Lm, E] for Lm layers.
State = Mapping[str, Float[Array, "Lm E"]]
# The sums of a batch for all layers: "assigned" [Lm, E] and what `Rule.observe` returns.
Sums = Mapping[str, Shaped[Array, "Lm ..."]]
TARGET = "balancing_target"
WANTED = "balancing_wanted"
HISTOGRAM = "balancing_histogram"


class Routed(NamedTuple):
  """The scores of a layer in one step.

  Attributes:
    scores: The scores to which the router adds the bias.
    bias: The bias with which the tokens were routed.
    valid: True for real tokens.
    k: Experts per token.
  """

  scores: Float[Array, "N E"]
  bias: Float[Array, "E"]
  valid: Bool[Array, "N"]
  k: int

  @property
  def margin(self) -> Float[Array, "N E"]:
    """alpha_i - s_ij, which b_j must exceed for token i to choose expert j; k must be below E."""
    return threshold(self.scores, self.bias, self.k)[:, None] - self.scores


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule of loss-free balancing.

  Attributes:
    update: `f(state, sums, options, u)`, which returns the next state.
    rate: The rate u if the option `rate` is None.
    memory: The names of the arrays that the state has beside "bias".
    observe: `f(routed, options)`, which returns what the update must know about one layer's scores
      beside the number of assignments. None means nothing.
    adds_up: Whether what `observe` returns of parts of a batch adds up to that of the batch.
    general: Whether the rule is for all routers with a bias. Others are named in `Router.rules`.
  """

  update: Callable[[State, Sums, BalancingOptions, float], dict[str, Array]]
  rate: float
  memory: tuple[str, ...] = ()
  observe: Callable[..., dict[str, Array]] | None = None
  adds_up: bool = True
  general: bool = True


def lacking(assigned: Int[Array, "Lm E"]) -> Float[Array, "Lm E"]:
  """Returns v_j = 1 - c_j E / sum_i c_i: 0 at balance, 1 without tokens, 1 - E with all of them.

  It is 0 for all experts if there are no assignments.
  """
  total = jnp.sum(assigned, axis=-1, keepdims=True)
  share = assigned / jnp.maximum(total, 1)
  return jnp.where(total > 0, 1.0 - share * assigned.shape[-1], 0.0)


def exact_sign(assigned: Int[Array, "Lm E"]) -> Int[Array, "Lm E"]:
  """Returns sign(mean count - count) without rounding.

  An expert with exactly the mean number of assignments keeps its bias, whereas its share would
  round to either side of the mean.
  """
  # The difference mean - count has the sign of (whole part of the mean) - count or, if this is 0,
  # the sign of the rest of the division. Products of counts and E, and counts in float32, could be
  # too large to be exact.
  whole, rest = jnp.divmod(jnp.sum(assigned, axis=-1, keepdims=True), assigned.shape[-1])
  return jnp.sign(whole - assigned) + ((whole == assigned) & (rest > 0))


def _centred(values: Float[Array, "*Lm E"]) -> Float[Array, "*Lm E"]:
  """Returns the values minus their mean over experts."""
  return values - jnp.mean(values, axis=-1, keepdims=True)


def _sign(state: State, sums: Sums, options: BalancingOptions, rate: float) -> dict[str, Array]:
  return {"bias": state["bias"] + rate * exact_sign(sums["assigned"])}


def _centred_sign(
  state: State, sums: Sums, options: BalancingOptions, rate: float
) -> dict[str, Array]:
  return {"bias": _centred(state["bias"] + rate * exact_sign(sums["assigned"]))}


def _proportional(
  state: State, sums: Sums, options: BalancingOptions, rate: float
) -> dict[str, Array]:
  return {"bias": state["bias"] + rate * lacking(sums["assigned"])}


def _pid(state: State, sums: Sums, options: BalancingOptions, rate: float) -> dict[str, Array]:
  error = lacking(sums["assigned"])
  integral = state["integral"] + error
  change = error - state["error"]
  bias = rate * (integral + options.proportional * error + options.derivative * change)
  return {"bias": bias, "integral": integral, "error": error}


def _smebu(state: State, sums: Sums, options: BalancingOptions, rate: float) -> dict[str, Array]:
  direction = _centred(jnp.tanh(options.slope * lacking(sums["assigned"])))
  momentum = options.momentum * state["momentum"] + (1 - options.momentum) * direction
  return {"bias": state["bias"] + rate * momentum, "momentum": momentum}


def _to_target(
  state: State, sums: Sums, options: BalancingOptions, rate: float
) -> dict[str, Array]:
  return {"bias": state["bias"] + rate * (sums[TARGET] - state["bias"])}


def _to_quantile_of_histogram(
  state: State, sums: Sums, options: BalancingOptions, rate: float
) -> dict[str, Array]:
  """Moves the bias to the quantile that a histogram shows, interpolated within its bin."""
  bias, counts = state["bias"], sums[HISTOGRAM]
  # Each token that chose k of E experts must lie below the quantile for k/E of the experts.
  wanted = jnp.sum(sums["assigned"], axis=-1)[:, None, None] / bias.shape[-1]
  below = jnp.cumsum(counts, axis=-1)
  bin_of = jnp.sum(below < wanted, axis=-1, keepdims=True)  # [Lm, E, 1]
  inside = jnp.take_along_axis(counts, bin_of, axis=-1)
  before = jnp.take_along_axis(below, bin_of, axis=-1) - inside
  place = (bin_of + (wanted - before) / jnp.maximum(inside, 1))[..., 0]
  low, width = jax.vmap(lambda b: _range(b, options.bins))(bias)
  target = _centred(low[:, None] + width[:, None] * place)
  some = jnp.sum(counts, axis=(-1, -2))[:, None] > 0
  return {"bias": bias + jnp.where(some, rate * (target - bias), 0.0)}


def _sparsity(state: State, sums: Sums, options: BalancingOptions, rate: float) -> dict[str, Array]:
  # The paper compares the mean over layers, so that layers may differ.
  too_many = jnp.sign(jnp.sum(sums["assigned"]) - jnp.sum(sums[WANTED]))
  return {"bias": state["bias"] + rate * too_many}


def _mean_k(state: State, sums: Sums, options: BalancingOptions, rate: float) -> dict[str, Array]:
  # One threshold for all layers, which may differ in how many experts they use.
  wanted = jnp.sum(sums[WANTED])
  error = (wanted - jnp.sum(sums["assigned"])) / jnp.maximum(wanted, 1)
  integral = state["integral"] + error
  bias = rate * (integral + options.proportional * error)
  return {"bias": bias, "integral": integral}


def _to_expert_quantile(
  state: State, sums: Sums, options: BalancingOptions, rate: float
) -> dict[str, Array]:
  # The first batch replaces the zeros from which the state begins.
  bias, target = state["bias"], sums[TARGET]
  return {"bias": jnp.where(bias == 0, target, bias + rate * (target - bias))}


def _observe_wanted(routed: Routed, options: BalancingOptions) -> dict[str, Array]:
  """Returns the number m k of assignments that the rule aims at."""
  return {WANTED: routed.k * jnp.sum(routed.valid, dtype=jnp.int32)}


def _observe_expert_quantile(routed: Routed, options: BalancingOptions) -> dict[str, Array]:
  """Returns minus the score that k/E of the real tokens exceed, for each expert."""
  return {TARGET: _quantile(-routed.scores, routed)}


def _observe_quantile(routed: Routed, options: BalancingOptions) -> dict[str, Array]:
  """Returns the bias at which k/E of the tokens would choose each expert, minus its mean.

  A limit on the groups of experts that a token may use has no influence on alpha, although it has
  some on the choice.
  """
  return {TARGET: _centred(_quantile(routed.margin, routed))}


def _observe_histogram(routed: Routed, options: BalancingOptions) -> dict[str, Array]:
  """Returns how many tokens have alpha_i - s_ij in each bin, as int32 [E, bins].

  The bins divide [min b - 1, max b + 1] evenly (Kimi K3 report, appendix D). This holds all values
  if scores lie in [0, 1], as probabilities do; others count in the outermost bins.
  """
  low, width = _range(routed.bias, options.bins)
  bins = jnp.floor((routed.margin - low) / width)
  bins = jnp.clip(bins, 0, options.bins - 1).astype(jnp.int32)
  num_experts = routed.bias.shape[-1]
  experts = jnp.broadcast_to(jnp.arange(num_experts), bins.shape)
  counts = jnp.zeros((num_experts, options.bins), jnp.int32)
  return {HISTOGRAM: counts.at[experts, bins].add(routed.valid[:, None].astype(jnp.int32))}


def _observe_dual(routed: Routed, options: BalancingOptions) -> dict[str, Array]:
  """Returns minus the prices q of the experts after some steps for the dual problem.

  The assignment of k experts to each token, at most m k / E tokens to each expert, with the highest
  sum of scores is an integer program. Its dual has a price p_i >= 0 for each token and q_j >= 0 for
  each expert, which are minimised in turn:

      p_i = max(0, (k+1)-th largest of s_ij - q_j over j)
      q_j = max(0, (mk/E + 1)-th largest of s_ij - p_i over i)

  Deviation: arXiv 2502.15451 routes the same batch with the result, so that a token's experts
  depend on later tokens. Here the next batch is routed with it.
  """

  def step(_, q):
    p = jnp.maximum(threshold(routed.scores, -q, routed.k), 0.0)
    return jnp.maximum(-_quantile(p[:, None] - routed.scores, routed._replace(bias=-q)), 0.0)

  first = jnp.maximum(-routed.bias, 0.0)
  return {TARGET: -jax.lax.fori_loop(0, options.iterations, step, first)}


def threshold(scores: Float[Array, "N E"], bias: Float[Array, "E"], k: int) -> Float[Array, "N"]:
  """Returns alpha_i, the (k+1)-th largest s_ij + b_j of each token; k must be below E."""
  return jax.lax.top_k(scores + bias, k + 1)[0][:, k]


def _quantile(values: Float[Array, "N E"], routed: Routed) -> Float[Array, "E"]:
  """Returns the k/E quantile of each expert's values over the real tokens.

  It lies half-way between the c-th and the next of the m sorted values, c = m k / E. If there are
  fewer than two real tokens, it is the present bias.
  """
  # Padding sorts last.
  ascending = jnp.sort(jnp.where(routed.valid[:, None], values, jnp.inf), axis=0)
  real, num_experts = jnp.sum(routed.valid), values.shape[-1]
  c = jnp.clip(jnp.round(real * (routed.k / num_experts)).astype(jnp.int32), 1, real - 1)
  found = (ascending[c - 1] + ascending[jnp.minimum(c, ascending.shape[0] - 1)]) / 2
  return jnp.where(real > 1, found, routed.bias)


def _range(bias: Float[Array, "E"], bins: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Returns the lower end of a histogram and the width of its bins."""
  low = jnp.min(bias) - 1.0
  return low, (jnp.max(bias) + 1.0 - low) / bins


RULES: Mapping[str, Rule] = {
  "sign": Rule(_sign, 0.001),
  "centred_sign": Rule(_centred_sign, 0.001),
  "proportional": Rule(_proportional, 0.01),
  "pid": Rule(_pid, 0.01, memory=("integral", "error")),
  "smebu": Rule(_smebu, 0.001, memory=("momentum",)),
  "quantile": Rule(_to_target, 1.0, observe=_observe_quantile, adds_up=False),
  "quantile_histogram": Rule(_to_quantile_of_histogram, 1.0, observe=_observe_histogram),
  "bip": Rule(_to_target, 1.0, observe=_observe_dual, adds_up=False),
  "sparsity": Rule(_sparsity, math.log(1.2), observe=_observe_wanted, general=False),
  "expert_quantile": Rule(
    _to_expert_quantile, 0.1, observe=_observe_expert_quantile, adds_up=False, general=False
  ),
  "mean_k": Rule(_mean_k, 0.01, ("integral",), observe=_observe_wanted, general=False),
}


@dataclasses.dataclass(frozen=True)
class BalancingOptions(Options):
  """The section `model.moe.balancing`: how a bias balances the experts without a loss."""

  rule: Annotated[str, OneOf({"none": None, **RULES})] = option(
    "none", "The rule that moves the bias after each step; none = there is no bias.", neutral="none"
  )
  rate: Annotated[float, NOT_NEGATIVE] | None = option(
    None,
    "Step u of the rule, in units of scores; of quantile and bip, the part of the way to the new "
    "bias; None is the rule's own (0.001 of sign, centred_sign and smebu; 0.01 of proportional, "
    "pid and mean_k; 0.1 of expert_quantile; ln 1.2 of sparsity; 1 of the others).",
    neutral=None,
  )
  proportional: Annotated[float, NOT_NEGATIVE] = option(
    1.0,
    "Gain p of pid and mean_k for the present error, relative to that for the sum of all.",
    neutral=1.0,
  )
  derivative: Annotated[float, NOT_NEGATIVE] = option(
    0.0, "Gain d of pid for the change of the lack, relative to that for the sum.", neutral=0.0
  )
  slope: Annotated[float, NOT_NEGATIVE] = option(
    1.0,
    "Factor c of smebu on the lack before the tanh; its report's value is not known to us.",
    neutral=1.0,
  )
  momentum: Annotated[float, Bounds(0, 1, "a weight of the past", below=True)] = option(
    0.9, "Weight a of the past in smebu; its report's value is not known to us.", neutral=0.9
  )
  bins: Annotated[int, Bounds(2, 2**16, "E times as many counts are kept for each layer")] = option(
    1000, "Bins of quantile_histogram (Kimi K3 has 1,000).", neutral=1000
  )
  iterations: Annotated[int, Bounds(1, 1000, "each sorts all tokens for each expert")] = option(
    4, "Steps of bip for the dual problem, in each step of training.", neutral=4
  )

  @property
  def chosen(self) -> Rule | None:
    """The rule, or None if there is no bias."""
    return None if self.rule == "none" else RULES[self.rule]

  @property
  def state(self) -> tuple[str, ...]:
    """The names of the arrays of the state; there is none without a rule."""
    return () if self.chosen is None else ("bias", *self.chosen.memory)


def update(state: State, sums: Sums, options: BalancingOptions) -> State:
  """Returns the state after one step of the rule.

  Args:
    state: "bias" and the rule's memory, each [Lm, E]. An empty one stays empty.
    sums: The sums of the whole batch, over all devices and microbatches.
    options: The section `model.moe.balancing`, which names a rule.
  """
  rule = options.chosen
  if not state or rule is None:
    return state
  return rule.update(state, sums, options, rule.rate if options.rate is None else options.rate)


def observe(
  logits: Float[Array, "G S E"],
  bias: Float[Array, "E"],
  valid: Bool[Array, "G S"],
  *,
  scores: Callable[[Array], Array],
  k: int,
  options: BalancingOptions,
) -> dict[str, Array]:
  """Returns what the rule must know about one layer's scores, for its sums; {} if nothing.

  It carries no gradient.

  Args:
    logits: The router's logits.
    bias: The bias with which they were routed.
    valid: True for real tokens.
    scores: Logits -> the scores to which the router adds the bias (`Router.biased`).
    k: Experts per token, below E.
    options: The section `model.moe.balancing`.
  """
  rule = options.chosen
  if rule is None or rule.observe is None:
    return {}
  flat = jax.lax.stop_gradient(logits.astype(jnp.float32)).reshape(-1, logits.shape[-1])
  return rule.observe(Routed(scores(flat), bias, valid.reshape(-1), k), options)
