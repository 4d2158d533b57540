"""All balancers on the same drifting logits, without a model.

  python -m experiments balance_lab simulate [--only=NAME,NAME] [--write]

In each step `TOKENS` tokens, in sequences of `LENGTH`, have logits

    x_tj = d_j + a_j + 0.25 n_sj + n_tj,   n ~ N(0, 1)

Here d_j is a skew of expert j that all tokens share, n_sj belongs to a sequence and n_tj to a
token. Each token takes `K` of `EXPERTS` experts by sigmoid(x) plus a bias b. Balancing rules move
b. Losses move a, by Adam on the gradient of their loss, as a router's weights would be moved. Both
are moved after the step that they were measured in. d ~ N(0, 1) is still for 150 steps, does a
random walk with a step of `WALK` for 150 steps, is drawn anew, and is still for 150 more.

Each method with a rate is tried at the four rates of `RATES`. A tuned row is the rate with the
smallest violation while d walks.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from experiments.common import journal
from moe_jax.errors import ConfigError
from moe_jax.routing import ROUTERS, RoutingContext, losses, metrics
from moe_jax.routing.balancing import BalancingOptions, observe, update

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "drift.jsonl"
EXPERTS, K, TOKENS, LENGTH, SEEDS = 16, 4, 8192, 128, 3
STILL, WALKING, AGAIN = range(150), range(150, 300), range(300, 450)
WALK = 0.02
BALANCED = 0.1  # the max violation below which the load counts as balanced
LAST = 50  # the steps at the end of a stretch over which a steady violation is averaged
# The rates that are tried. Those of a sign and of Adam are steps of a score or a logit; those of
# the proportional rules are such steps per even share that an expert lacks.
_STEPS, _GAINS = (0.001, 0.003, 0.01, 0.03), (0.01, 0.03, 0.1, 0.3)
RATES: Mapping[str, Sequence[float | None]] = {
  "none": (None,),
  "sign": _STEPS,
  "centred_sign": _STEPS,
  "smebu": _STEPS,
  "proportional": _GAINS,
  "pid": _GAINS,
  "quantile": (None,),
  "quantile_histogram": (None,),
  "bip": (None,),
  "loss_sequence": _STEPS,
  "loss_microbatch": _STEPS,
  "loss_global": _STEPS,
  "sinkhorn": (None,),
}
# The number of sequences over which f and P of a loss are averaged before they are multiplied.
_OVER = {
  "loss_sequence": 1,
  "loss_microbatch": TOKENS // LENGTH // 4,
  "loss_global": TOKENS // LENGTH,
}

State = dict[str, Any]


def logits_of(key: Array, skew: Float[Array, "E"]) -> Float[Array, "S E"]:
  """Returns the logits of one step without what a loss has learnt."""
  of_sequence, of_token = jax.random.split(key)
  sequences = TOKENS // LENGTH
  shared = 0.25 * jax.random.normal(of_sequence, (sequences, 1, EXPERTS))
  own = jax.random.normal(of_token, (sequences, LENGTH, EXPERTS))
  return skew + (shared + own).reshape(TOKENS, EXPERTS)


def skews(seed: int) -> Float[np.ndarray, "steps E"]:
  """Returns d of each step."""
  rng = np.random.default_rng(seed)
  first, anew = rng.normal(size=(2, EXPERTS))
  walk = first + WALK * np.cumsum(rng.normal(size=(len(WALKING), EXPERTS)), axis=0)
  return np.concatenate([np.tile(first, (len(STILL), 1)), walk, np.tile(anew, (len(AGAIN), 1))])


def _counts(chosen: Array) -> Array:
  return jnp.zeros(EXPERTS, jnp.int32).at[chosen].add(1)


def _by_rule(name: str, rate: float | None) -> tuple[State, Callable]:
  """Returns the first state of a rule, and its step (state, logits) -> (state, counts)."""
  options = BalancingOptions(rule=name, rate=rate)
  valid = jnp.ones((1, TOKENS), bool)

  def step(state, logits):
    bias = state["bias"][0] if state else jnp.zeros(EXPERTS)
    counts = _counts(jax.lax.top_k(jax.nn.sigmoid(logits) + bias, K)[1])
    seen = observe(logits[None], bias, valid, scores=jax.nn.sigmoid, k=K, options=options)
    sums = {key: value[None] for key, value in (seen | {"assigned": counts}).items()}
    return update(state, sums, options), counts

  return {key: jnp.zeros((1, EXPERTS)) for key in options.state}, step


def _by_loss(name: str, rate: float) -> tuple[State, Callable]:
  """Returns the first state of a loss, and its step."""
  optimizer = optax.adam(rate, b1=0.9, b2=0.95)
  parts = TOKENS // LENGTH // _OVER[name]

  def step(state, logits):
    offset, moments = state["offset"], state["moments"]
    chosen = jax.lax.top_k(jax.nn.sigmoid(logits + offset), K)[1]
    f = jax.vmap(_counts)(chosen.reshape(parts, -1)) / (TOKENS * K / parts)  # [parts, E]

    def loss(offset):
      scores = losses.SCORES["sigmoid"](logits + offset).reshape(parts, -1, EXPERTS)
      return jnp.mean(jax.vmap(losses.balance)(f, scores.mean(axis=1)))

    updates, moments = optimizer.update(jax.grad(loss)(offset), moments)
    state = {"offset": optax.apply_updates(offset, updates), "moments": moments}
    return state, _counts(chosen)

  offset = jnp.zeros(EXPERTS)
  return {"offset": offset, "moments": optimizer.init(offset)}, step


def _sinkhorn(name: str, rate: float | None) -> tuple[State, Callable]:
  """Returns the step of a router that balances each batch by itself and keeps no state."""
  route = functools.partial(ROUTERS["sinkhorn"].route, k=K)

  def step(state, logits):
    return state, metrics.assigned(route(logits, RoutingContext(train=True)))

  return {}, step


def method(name: str, rate: float | None) -> tuple[State, Callable]:
  """Returns the first state of a method, and its step (state, logits) -> (state, counts [E])."""
  if name in _OVER:
    assert rate is not None
    return _by_loss(name, rate)
  return (_sinkhorn if name == "sinkhorn" else _by_rule)(name, rate)


def simulate(name: str, rate: float | None, seed: int) -> Float[np.ndarray, "steps"]:
  """Returns the max violation of each step of one seed."""
  state, step = method(name, rate)
  return _trace(step)(state, jnp.asarray(skews(seed), jnp.float32), jax.random.key(seed))


def _trace(step: Callable) -> Callable[..., np.ndarray]:
  """Returns the compiled loop over all steps."""

  @jax.jit
  def run(state, skew, key):
    keys = jax.random.split(key, len(skew))

    def one(state, moment):
      state, counts = step(state, logits_of(*moment))
      return state, metrics.max_violation(counts / jnp.sum(counts))

    return jax.lax.scan(one, state, (keys, skew))[1]

  return lambda *arguments: np.asarray(run(*arguments))


def microseconds(name: str, rate: float | None, repeats: int = 20) -> float:
  """Returns the median time of one step of a method, its routing included, logits given."""
  state, step = method(name, rate)
  logits = logits_of(jax.random.key(0), jnp.zeros(EXPERTS))
  compiled = jax.jit(step)
  jax.block_until_ready(compiled(state, logits))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(compiled(state, logits))
    times.append(time.perf_counter() - start)
  return 1e6 * statistics.median(times)


def first_below(violations: Float[np.ndarray, "T"]) -> float:
  """Returns the number of steps before the first below `BALANCED`; infinity if there is none."""
  below = np.flatnonzero(violations < BALANCED)
  return float(below[0]) if len(below) else math.inf


def measures(violations: Float[np.ndarray, "steps"]) -> dict[str, float]:
  """Returns what the table shows of one seed."""
  return {
    "steps": first_below(violations[list(STILL)]),
    "still": float(violations[STILL[-LAST:]].mean()),
    "walking": float(violations[WALKING[-LAST:]].mean()),
    "after": first_below(violations[list(AGAIN)]),
  }


def row(name: str, rate: float | None) -> str:
  """Returns the name of a row."""
  return name if rate is None else f"{name}_{rate:g}"


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument("--only", default="", help="only these methods, separated by commas")
  parser.add_argument("--write", action="store_true", help=f"add the results to {RESULTS.name}")


def action(options: argparse.Namespace) -> int:
  """Simulates what is missing in drift.jsonl, or all that was asked for, and prints it.

  Raises:
    ConfigError: There is no such method.
  """
  chosen = options.only.split(",") if options.only else list(RATES)
  for name in chosen:
    if name not in RATES:
      raise ConfigError("only", name, f"is no method; known: {', '.join(RATES)}")
  done = journal.load(RESULTS) if options.write else {}
  jobs = [(n, r) for n in chosen for r in RATES[n] if row(n, r) not in done]
  for name, rate in tqdm(jobs, unit="row"):
    curves = np.stack([simulate(name, rate, seed) for seed in range(SEEDS)])
    seeds = [measures(curve) for curve in curves]
    line = {
      "row": row(name, rate),
      "method": name,
      "rate": rate,
      "seeds": [{key: _plain(value) for key, value in seed.items()} for seed in seeds],
      "curve": [round(float(value), 4) for value in curves.mean(axis=0)],
      "microseconds": round(microseconds(name, rate), 1),
      "date": datetime.date.today().isoformat(),
      "python": platform.python_version(),
      "jax": jax.__version__,
      "hardware": f"{jax.device_count()} x {jax.default_backend()}",
    }
    if options.write:
      journal.append(RESULTS, line)
    tqdm.write(f"{line['row']}: {json.dumps(line['seeds'][0])}, {line['microseconds']:.0f} us")
  if options.write:
    # Imported here, because the module of the table imports this one.
    from experiments.balance_lab import table
    from experiments.common import tables

    table.draw()
    tables.write(table.README, table.tables())
  return 0


def _plain(value: float) -> float | None:
  """Returns the number for JSON, which has no infinity."""
  return round(value, 4) if math.isfinite(value) else None
