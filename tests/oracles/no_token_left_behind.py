"""Oracle of No-Token-Left-Behind (Switch, arXiv 2101.03961, appendix B)."""

from oracles import draws


def no_token_left_behind(logits, context, choices=4, capacity_factor=1.25):
  probs = draws.softmax(logits)
  num_tokens, num_experts = probs.shape
  free = [min(max(round(capacity_factor * num_tokens / num_experts), 1), num_tokens)] * num_experts
  waiting, plan = draws.valid_tokens(logits, context), []
  for i in range(min(choices, num_experts)):
    overflow = []
    for token in waiting:
      e = sorted(range(num_experts), key=lambda e: (-probs[token, e], e))[i]
      if free[e] > 0:
        free[e] -= 1
        plan.append((token, e, probs[token, e]))
      else:
        overflow.append(token)
    waiting = overflow
  return plan
