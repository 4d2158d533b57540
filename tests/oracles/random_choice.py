"""Oracle of random routing to K different experts, for which no paper has an equation."""

import jax
import numpy as np

from oracles import draws, order


def random_choice(logits, context, k=1, seed=0):
  key = context.key if context.train else None
  if key is None:
    key = jax.random.key(seed)
    key = key if context.salt is None else jax.random.fold_in(key, context.salt)
    key = key if context.group is None else jax.random.fold_in(key, context.group)
  u = draws.uniform(key, np.shape(logits))
  chosen = {}
  for t in draws.valid_tokens(logits, context):
    best = sorted(range(u.shape[1]), key=lambda e: (-u[t, e], e))[:k]
    chosen[t] = [(t, e, 1.0 / k) for e in best]
  return order.in_order(chosen, k, "choice")
