"""Oracle of token rounding (SonicMoE, arXiv 2512.14080)."""

import numpy as np

from oracles import draws


def token_rounding(logits, context, k=2, tile=8, rounding="nearest"):
  probs = draws.softmax(logits)
  tokens, num_experts = draws.valid_tokens(logits, context), probs.shape[-1]
  wants = {
    t: sorted(range(num_experts), key=lambda e: (-float(logits[t][e]), e))[:k] for t in tokens
  }
  served = []
  for e in range(num_experts):
    chose = [t for t in tokens if e in wants[t]]
    others = [t for t in tokens if e not in wants[t]]
    if not context.train:
      served += [(t, e) for t in chose]
      continue
    whole, left = divmod(len(chose), tile)
    more = {"nearest": left >= tile - tile // 2, "up": left > 0, "down": False}[rounding]
    count = min((whole + more) * tile, len(tokens) // tile * tile)
    # float32 probabilities decide, because some that differ in float64 are equal there.
    by_probability = [
      sorted(each, key=lambda t: (-np.float32(probs[t, e]), t)) for each in (chose, others)
    ]
    served += [(t, e) for t in sum(by_probability, [])[:count]]
  return [(t, e, probs[t, e]) for t, e in sorted(served)]
