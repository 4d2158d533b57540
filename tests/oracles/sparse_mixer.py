"""Oracle of SparseMixer (arXiv 2409.12136), after the code of Phi-3.5-MoE."""

import jax
import numpy as np

from oracles import draws, order


def sparse_mixer(logits, context, k=2, epsilon=0.01):
  logits = np.asarray(logits, np.float64)
  samples = context.train and context.key is not None
  keys = jax.random.split(context.key, 2 * k) if samples else None
  chosen = {t: [] for t in draws.valid_tokens(logits, context)}
  for c in range(k):
    if samples:
      gumbel = np.asarray(jax.random.gumbel(keys[2 * c], logits.shape), np.float64)
      u = draws.uniform(keys[2 * c + 1], len(logits))
    for t, taken in chosen.items():
      x, before = logits[t], [e for _, e, _ in taken]
      free = [e for e in range(len(x)) if e not in before]
      largest = max(x[e] for e in free)
      kept = [e for e in free if largest - x[e] <= 2 * epsilon * max(abs(x[e]), largest)]
      best = max(kept, key=lambda e: (x[e], -e))
      expert, factor = best, 1.0
      if samples:
        expert = max(kept, key=lambda e: (x[e] + gumbel[t, e], -e))
        factor = 1.0 if expert == best or u[t] < 0.25 else 1 / 3
      probability = draws.softmax(x[kept])[kept.index(expert)]
      taken.append((t, expert, probability * factor))
  return order.in_order(chosen, k, "choice")
