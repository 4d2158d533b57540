"""Recorded routing with planted specialisation, for tests of the statistics and of the page."""

import numpy as np

from moe_jax.analysis.kinds import kinds_of
from moe_jax.analysis.recorded import Recorded

EXPERTS = 4


def record(plant, layers=2, domains=2, rows=20, length=64, **changes):
  """Returns routing in which `plant(draw, ids, domain)` makes the experts of each layer."""
  draw = np.random.default_rng(0)
  count = domains * rows * length
  domain = np.repeat(np.arange(domains), rows * length)
  # Each domain prefers other tokens, but shares all of them with the others.
  ids = np.minimum(draw.integers(0, 16, count), draw.integers(0, 16, count))
  ids = np.where(domain % 2, 15 - ids, ids)
  first = np.stack([plant(draw, ids, domain) for _ in range(layers)])
  pieces = [chr(ord("a") + i) for i in ids]
  place = np.arange(count)
  fields = dict(
    layers=[f"layer {2 * i + 1}" for i in range(layers)],
    domains=[f"domain {d}" for d in range(domains)],
    num_experts=EXPERTS,
    ids=ids,
    pieces=pieces,
    kind=kinds_of(pieces),
    domain=domain,
    row=place // length,
    follows=place % length > 0,
    first=first,
    second=(first + 1) % EXPERTS,
    entropy=np.stack([np.full(count, 1.2 - 0.1 * i) for i in range(layers)]),
    top=np.stack([np.full(count, 0.4 + 0.05 * i) for i in range(layers)]),
  )
  return Recorded(**fields | changes)


def by_nothing(draw, ids, domain):
  """Experts that are drawn at random."""
  return draw.integers(0, EXPERTS, len(ids))


def by_token(draw, ids, domain):
  """Half of the tokens have an expert of their identity."""
  return np.where(draw.random(len(ids)) < 0.5, ids % EXPERTS, by_nothing(draw, ids, domain))


def by_domain(draw, ids, domain):
  """Half of the tokens have an expert of their domain."""
  return np.where(draw.random(len(ids)) < 0.5, domain, by_nothing(draw, ids, domain))
