"""Oracle of experts by a hash with learned gates (DeepSeek-V4)."""

import math

from oracles import draws, order
from oracles.hash_layer import mix


def hash_top_k(
  logits, context, k=2, score="sqrt_softplus", gate_norm="top_k", norm_eps=1e-20, seed=0
):
  num_experts, chosen = len(logits[0]), {}
  salted = seed if context.salt is None else mix(int(context.salt), seed)
  for t in draws.valid_tokens(logits, context):
    x = [float(each) for each in logits[t]]
    s = {
      "softmax": lambda x: list(draws.softmax(x)),
      "sigmoid": lambda x: [1.0 / (1.0 + math.exp(-each)) for each in x],
      "sqrt_softplus": lambda x: [math.sqrt(math.log1p(math.exp(each))) for each in x],
    }[score](x)
    number = mix(int(context.token_ids[t]), salted)
    best = sorted(range(num_experts), key=lambda e: (-mix(number, e), e))[:k]
    total = sum(s[e] for e in best) + norm_eps if gate_norm == "top_k" else 1.0
    chosen[t] = [(t, e, s[e] / total) for e in best]
  return order.in_order(chosen, k, "choice")
