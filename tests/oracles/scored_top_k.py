"""Oracle of token choice by named parts (DeepSeek-V2, V3 and V4, and Kolibri)."""

import math

from oracles import draws, order


def _softplus_root(x):
  # math.log1p keeps log(1 + e^x) exact where e^x is tiny.
  return math.sqrt(max(x, 0.0) + math.log1p(math.exp(-abs(x))))


def scored_top_k(
  logits,
  context,
  k=2,
  score="softmax",
  bias_on="scores",
  groups=1,
  kept_groups=1,
  group_score="top_2_sum",
  gate_norm="top_k",
  norm_eps=0.0,
  priority="choice",
):
  num_experts = len(logits[0])
  size = num_experts // groups
  bias = [0.0 if context.bias is None else float(context.bias[e]) for e in range(num_experts)]
  chosen, first = {}, {}
  for t in draws.valid_tokens(logits, context):
    x = [float(each) for each in logits[t]]
    s = {
      "softmax": lambda x: list(draws.softmax(x)),
      "sigmoid": lambda x: [1.0 / (1.0 + math.exp(-each)) for each in x],
      "sqrt_softplus": lambda x: [_softplus_root(each) for each in x],
    }[score](x)
    ranked = [a + b for a, b in zip(x if bias_on == "logits" else s, bias, strict=True)]
    strength = {}
    for n in range(groups):
      members = sorted(ranked[n * size : (n + 1) * size])
      strength[n] = members[-1] if group_score == "max" else sum(members[-2:])
    kept = sorted(strength, key=lambda n: (-strength[n], n))[:kept_groups]
    inside = [e for e in range(num_experts) if e // size in kept]
    best = sorted(inside, key=lambda e: (-ranked[e], e))[:k]
    total = sum(s[e] for e in best) + norm_eps if gate_norm == "top_k" else 1.0
    chosen[t] = [(t, e, s[e] / total) for e in best]
    first[t] = s[best[0]]
  return order.in_order(chosen, k, priority, first)
