"""The order of service of token choice, for oracles."""


def in_order(chosen, k, priority, score=None):
  """The K assignments of each token, as one list.

  Args:
    chosen: token -> its assignments, the first choice first.
    k: K.
    priority: "choice": all first choices, then all second ones; "token": token by token; "gate": as
      "choice", but the tokens of the highest score first.
    score: token -> score, for "gate".
  """
  tokens = sorted(chosen)
  if priority == "token":
    return [assignment for t in tokens for assignment in chosen[t]]
  if priority == "gate":
    tokens.sort(key=lambda t: -score[t])  # stable: ties keep their position
  return [chosen[t][c] for c in range(k) for t in tokens]
