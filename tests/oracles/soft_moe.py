"""Oracle of Soft MoE (arXiv 2308.00951) for one group, with loops over tokens and slots."""

import numpy as np


def soft_moe(x, mu, scale, experts, real):
  """Returns the outputs of a Soft MoE layer and its dispatch and combine weights.

  Args:
    x: The tokens, [S, D].
    mu: The directions of the slots, [D, E, p].
    scale: The scale of the logits.
    experts: For each of the E experts, a function from a row to a row.
    real: The positions of tokens that are not padding.

  Returns:
    (y [S, D], dispatch weights [S, E, p], combine weights [S, E, p]). The rows of padding are 0 in
    all three.
  """
  x, mu = np.asarray(x, np.float64), np.asarray(mu, np.float64)
  tokens, num_experts, slots = len(x), *mu.shape[1:]

  def unit(v):
    return v / np.sqrt(np.sum(v**2) + 1e-6)

  logits = np.zeros((tokens, num_experts, slots))
  for t in real:
    for e in range(num_experts):
      for p in range(slots):
        logits[t, e, p] = float(scale) * unit(x[t]) @ unit(mu[:, e, p])
  dispatch, combine = np.zeros_like(logits), np.zeros_like(logits)
  for t in real:
    combine[t] = np.exp(logits[t]) / np.sum(np.exp(logits[t]))
  y = np.zeros_like(x)
  for e in range(num_experts):
    for p in range(slots):
      total = sum(np.exp(logits[t, e, p]) for t in real)
      slot = np.zeros(x.shape[1])
      for t in real:
        dispatch[t, e, p] = np.exp(logits[t, e, p]) / total
        slot += dispatch[t, e, p] * x[t]
      out = np.asarray(experts[e](slot))
      for t in real:
        y[t] += combine[t, e, p] * out
  return y, dispatch, combine
