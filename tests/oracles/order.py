"""The order in which the assignments of token choice are served, for oracles."""


def in_order(chosen, k, priority, score=None):
  """Returns the K assignments of each token as one list in order of priority.

  Args:
    chosen: Maps each token to its assignments, the first choice first.
    k: The number of assignments per token, K.
    priority: "choice" puts all first choices before all second choices. "token" puts all choices of
      a token together. "gate" is like "choice", but tokens with higher scores come first.
    score: Maps each token to its score, for "gate".
  """
  tokens = sorted(chosen)
  if priority == "token":
    return [assignment for t in tokens for assignment in chosen[t]]
  if priority == "gate":
    tokens.sort(key=lambda t: -score[t])  # The sort is stable, so ties keep their position.
  return [chosen[t][c] for c in range(k) for t in tokens]
