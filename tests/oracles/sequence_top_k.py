"""Oracle of SeqTopK (2025)."""

from oracles import draws


def sequence_top_k(logits, context, k=2):
  probs = draws.softmax(logits)
  pairs = [(t, e) for t in draws.valid_tokens(logits, context) for e in range(probs.shape[-1])]
  pairs.sort(key=lambda pair: (-probs[pair], pair))
  return [(t, e, probs[t, e]) for t, e in pairs[: len(logits) * k]]
