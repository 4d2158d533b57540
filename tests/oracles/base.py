"""Oracle of BASE layers (arXiv 2103.16716), whose auction loops over bidders and experts."""

import math

import numpy as np

from oracles import draws


def base(logits, context, epsilon=0.01):
  logits = np.asarray(logits, np.float64)
  tokens = draws.valid_tokens(logits, context)
  if not context.train:
    assigned = {t: int(np.argmax(logits[t])) for t in tokens}
  else:
    assigned = dict(zip(tokens, auction(logits[tokens], epsilon), strict=True))
  return [(t, assigned[t], 1.0 / (1.0 + math.exp(-logits[t, assigned[t]]))) for t in tokens]


def auction(values, epsilon):
  """Returns the expert of each row by a Jacobi auction with ceil(n/E) places per expert.

  All rows are real tokens.
  """
  n, num_experts = values.shape
  if n == 0:
    return []
  places = math.ceil(n / num_experts)
  spread = values.max() - values.min()
  step = epsilon * (spread if spread > 0 else 1.0)
  price = [step * round(values[:, j].mean() / step) for j in range(num_experts)]
  # The rows after the first n are dummies, which fill the remaining places.
  rows = [list(row) for row in values] + [[0.0] * num_experts] * (num_experts * places - n)
  held = {j: [] for j in range(num_experts)}  # [(-bid, row)], the highest bid first
  waiting = list(range(len(rows)))
  while waiting:
    bids = []
    for i in waiting:
      offers = [rows[i][j] - price[j] for j in range(num_experts)]
      best = offers.index(max(offers))
      others = [offer for j, offer in enumerate(offers) if j != best]
      bids.append((best, rows[i][best] - max(others, default=-math.inf) + step, i))
    waiting = []
    for j in held:
      ranked = sorted(held[j] + [(-bid, i) for best, bid, i in bids if best == j])
      held[j], lost = ranked[:places], ranked[places:]
      waiting += [i for _, i in lost]
      if len(held[j]) == places:
        price[j] = -held[j][-1][0]
    waiting.sort()
  owner = {i: j for j in held for _, i in held[j]}
  return [owner[i] for i in range(n)]
