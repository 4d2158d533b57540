"""Oracle of routing by sigmoids and a bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

import math

from oracles import draws, order


def sigmoid_bias(
  logits, context, k=8, groups=1, kept_groups=1, gate_norm="top_k", priority="choice"
):
  num_experts = len(logits[0])
  size = num_experts // groups
  chosen, first = {}, {}
  for t in draws.valid_tokens(logits, context):
    s = [1.0 / (1.0 + math.exp(-float(x))) for x in logits[t]]
    biased = [
      s[e] + (0.0 if context.bias is None else float(context.bias[e])) for e in range(num_experts)
    ]
    strength = {n: sum(sorted(biased[n * size : (n + 1) * size])[-2:]) for n in range(groups)}
    kept = sorted(strength, key=lambda n: (-strength[n], n))[:kept_groups]
    inside = [e for e in range(num_experts) if e // size in kept]
    best = sorted(inside, key=lambda e: (-biased[e], e))[:k]
    total = sum(s[e] for e in best) if gate_norm == "top_k" else 1.0
    chosen[t] = [(t, e, s[e] / total) for e in best]
    first[t] = s[best[0]]
  return order.in_order(chosen, k, priority, first)
