"""Oracle of expert threshold routing (2026)."""

import numpy as np

from oracles import draws


def expert_threshold(logits, context, k=2, most=0):
  scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
  num_experts = scores.shape[-1]
  if context.bias is None:
    theta = np.full(num_experts, 0.5)
  else:
    theta = -np.asarray(context.bias, np.float64)
    theta[theta == 0] = 0.5
  plan = []
  for t in draws.valid_tokens(logits, context):
    above = [e for e in range(num_experts) if scores[t, e] > theta[e]]
    above.sort(key=lambda e: (-(scores[t, e] - theta[e]), e))
    plan += [(t, e, scores[t, e]) for e in above[: most or num_experts]]
  return plan
