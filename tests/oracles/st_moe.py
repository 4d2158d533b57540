"""Oracle of ST-MoE (arXiv 2202.08906, appendix G), with batch-prioritised routing."""

import numpy as np

from oracles import draws


def st_moe(logits, context, k=2, policy="random", threshold=0.2, priority="choice"):
  probs = draws.softmax(logits)
  num_tokens, num_experts = probs.shape
  is_random = policy == "random" and context.train and context.key is not None
  r = draws.uniform(context.key, (num_tokens, k)) if is_random else np.zeros((num_tokens, k))
  chosen = {}
  for token in draws.valid_tokens(logits, context):
    best = sorted(range(num_experts), key=lambda e: (-probs[token, e], e))[:k]
    total = sum(probs[token, e] for e in best) if k > 1 else 1.0
    chosen[token] = []
    for i, e in enumerate(best):
      g = probs[token, e] / total
      keeps = {"random": r[token, i] < g / threshold, "threshold": g > threshold, "all": True}[
        policy
      ]
      chosen[token].append((token, e, g) if i == 0 or keeps else None)
  tokens = list(chosen)
  if priority == "gate":
    tokens.sort(
      key=lambda token: -probs[token].max()
    )  # The sort is stable, so ties keep their position.
  if priority == "token":
    order = [chosen[token][i] for token in tokens for i in range(k)]
  else:
    order = [chosen[token][i] for i in range(k) for token in tokens]
  return [assignment for assignment in order if assignment is not None]
