"""Oracle of ReMoE (Wang et al. 2024)."""

from oracles import draws


def relu(logits, context, k=1, most=0):
  num_experts = len(logits[0])
  plan = []
  for t in draws.valid_tokens(logits, context):
    active = [(float(logits[t][e]), e) for e in range(num_experts) if logits[t][e] > 0]
    active.sort(key=lambda pair: (-pair[0], pair[1]))
    plan += [(t, e, gate) for gate, e in active[: most or num_experts]]
  return plan
