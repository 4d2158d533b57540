"""K different experts at random: no paper's equation."""

import jax
import numpy as np

from oracles import draws, order


def random_choice(logits, context, k=1, seed=0):
  drawn_anew = context.train and context.key is not None
  u = draws.uniform(context.key if drawn_anew else jax.random.key(seed), np.shape(logits))
  chosen = {}
  for t in draws.valid_tokens(logits, context):
    best = sorted(range(u.shape[1]), key=lambda e: (-u[t, e], e))[:k]
    chosen[t] = [(t, e, 1.0 / k) for e in best]
  return order.in_order(chosen, k, "choice")
