"""Oracle of capped expert choice (arXiv 2202.09368), which projects the matrix A itself."""

import numpy as np

from oracles import draws


def capped_expert_choice(
  logits, context, capacity_factor=2.0, max_experts=2, entropy=0.001, iterations=100
):
  scores = draws.softmax(logits).T  # [E, S]
  num_experts, num_tokens = scores.shape
  capacity = min(max(round(capacity_factor * num_tokens / num_experts), 1), num_tokens)
  tokens = draws.valid_tokens(logits, context)
  if not tokens:
    return []
  row_sum = min(capacity, len(tokens), len(tokens) * max_experts / num_experts)
  a = dykstra(scores[:, tokens], row_sum, max_experts, entropy, iterations)
  chosen = fill(a, scores[:, tokens], capacity, max_experts)
  plan = []
  for e in range(num_experts):
    for j in sorted(chosen[e], key=lambda j: (-a[e, j], j)):
      plan.append((tokens[j], e, scores[e, tokens[j]]))
  return plan


def fill(a, scores, capacity, max_experts):
  """Returns the list of tokens of each expert.

  Experts propose to tokens in order of A, and tokens accept in order of their scores, until no
  token accepts.
  """
  experts, tokens = range(a.shape[0]), range(a.shape[1])
  chosen = {e: [] for e in experts}
  while True:
    places = [max_experts - sum(j in chosen[e] for e in experts) for j in tokens]
    asked = {j: [] for j in tokens}
    for e in experts:
      can = [j for j in tokens if places[j] > 0 and j not in chosen[e]]
      for j in sorted(can, key=lambda j: (-a[e, j], j))[: capacity - len(chosen[e])]:
        asked[j].append(e)
    accepted = [
      (e, j)
      for j in tokens
      for e in sorted(asked[j], key=lambda e: (-scores[e, j], e))[: places[j]]
    ]
    if not accepted:
      return chosen
    for e, j in accepted:
      chosen[e].append(j)


def dykstra(scores, row_sum, max_experts, entropy, iterations):
  """Returns A after `iterations` sweeps, before the last projection on A <= 1.

  These are Dykstra's alternating projections with the KL divergence. Before each projection, the
  last correction of the same set is undone by a multiplication with q. Afterwards q is the quotient
  of the values before and after the projection.
  """
  # A common factor per row has no effect, because rows are scaled next.
  a = np.exp((scores - scores.max(axis=1, keepdims=True)) / entropy)
  q_column, q_entry = np.ones_like(a), np.ones_like(a)
  for _ in range(iterations):
    a = a * (row_sum / a.sum(axis=1, keepdims=True))
    uncapped = a * q_column
    a = uncapped * np.minimum(1.0, max_experts / uncapped.sum(axis=0, keepdims=True))
    q_column = uncapped / a
    uncut = a * q_entry
    a = np.minimum(uncut, 1.0)
    q_entry = uncut / a
  return uncut
