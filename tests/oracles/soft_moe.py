"""Soft MoE (arXiv 2308.00951), one group, token by token and slot by slot."""

import numpy as np


def soft_moe(x, mu, scale, experts, real):
  """(y [S, D], dispatch weights [S, E, p], combine weights [S, E, p]); the rows of padding are 0 in
  all three.

  Args:
    x: tokens [S, D].
    mu: slots' directions [D, E, p].
    scale: of the logits.
    experts: a function a row -> row for each of the E experts.
    real: the positions of tokens that are not padding.
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
