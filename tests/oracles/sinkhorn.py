"""Oracle of S-BASE (Clark et al. 2022, arXiv 2202.01169)."""

import numpy as np

from oracles import draws, order


def sinkhorn(logits, context, k=1, iterations=30, temperature=1.0, priority="choice"):
  probs = draws.softmax(logits)
  num_experts = probs.shape[1]
  tokens = draws.valid_tokens(logits, context)
  wish = {t: np.asarray(logits[t], np.float64) for t in tokens}
  if context.train and tokens:
    wish = dict(
      zip(
        tokens, plan(np.asarray(logits, np.float64)[tokens], iterations, temperature), strict=True
      )
    )
  chosen = {}
  for t in tokens:
    best = sorted(range(num_experts), key=lambda e: (-wish[t][e], e))[:k]
    chosen[t] = [(t, e, probs[t, e]) for e in best]
  return order.in_order(chosen, k, priority, {t: chosen[t][0][2] for t in chosen})


def plan(logits, iterations, temperature):
  """Returns P, by scaling columns to the sum T/E and rows to the sum 1 in turn.

  Unlike the router, it does not compute with logarithms.
  """
  num_tokens, num_experts = logits.shape
  p = draws.softmax(logits / temperature)
  for _ in range(iterations):
    for e in range(num_experts):
      p[:, e] *= num_tokens / num_experts / sum(p[:, e])
    for t in range(num_tokens):
      p[t] /= sum(p[t])
  return p
