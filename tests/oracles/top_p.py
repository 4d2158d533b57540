"""Oracle of top-p routing (Huang et al. 2024)."""

import numpy as np

from oracles import draws


def top_p(logits, context, p=0.4, k=2, most=0):
  probs = draws.softmax(logits)
  if context.bias is not None:
    p = p + float(np.mean(np.asarray(context.bias)))
  plan = []
  for t in draws.valid_tokens(logits, context):
    order = sorted(range(len(probs[t])), key=lambda e: (-probs[t][e], e))
    total, count = 0.0, 0
    while count == 0 or (total < p and count < len(order)):
      total, count = total + probs[t][order[count]], count + 1
    plan += [(t, e, probs[t][e]) for e in order[: min(count, most or count)]]
  return plan
