"""Oracle of strictly balanced gating (Shazeer et al. 2017, appendix F)."""

import numpy as np

from oracles import draws


def strictly_balanced(logits, context, k=4):
  num_tokens, num_experts = np.shape(logits)
  g_sigma = draws.softmax(logits)
  tokens = draws.valid_tokens(logits, context)
  m = min(max(round(k * num_tokens / num_experts), 1), num_tokens)
  kept = {}
  for e in range(num_experts):
    if context.train:
      kept[e] = sorted(tokens, key=lambda t, e=e: (-g_sigma[t, e], t))[:m]
    else:
      kept[e] = [t for t in tokens if g_sigma[t, e] > float(context.threshold[e])]
  total = {t: sum(g_sigma[t, e] for e in range(num_experts) if t in kept[e]) for t in tokens}
  return [(t, e, g_sigma[t, e] / total[t]) for e in range(num_experts) for t in kept[e]]
