"""Oracle of device-limited routing (DeepSeek-V2, arXiv 2405.04434, section 2.2.2)."""

from oracles import draws, order


def device_limited(
  logits, context, k=6, groups=8, kept_groups=3, gate_norm="none", priority="choice"
):
  probs = draws.softmax(logits)
  num_experts = probs.shape[1]
  devices = [
    range(d * num_experts // groups, (d + 1) * num_experts // groups) for d in range(groups)
  ]
  chosen = {}
  for t in draws.valid_tokens(logits, context):
    score = [
      probs[t, e] + (0.0 if context.bias is None else float(context.bias[e]))
      for e in range(num_experts)
    ]
    best_of = [max(score[e] for e in device) for device in devices]
    reachable = []
    for _ in range(kept_groups):
      d = best_of.index(max(best_of))  # the first among equal values
      best_of[d] = -10.0
      reachable += devices[d]
    best = sorted(reachable, key=lambda e: (-score[e], e))[:k]
    total = sum(probs[t, e] for e in best) if gate_norm == "top_k" else 1.0
    chosen[t] = [(t, e, probs[t, e] / total) for e in best]
  return order.in_order(chosen, k, priority, {t: probs[t, chosen[t][0][1]] for t in chosen})
