"""Oracle of noisy top-K gating (Shazeer et al. 2017, Eqs. 3 to 5)."""

import numpy as np

from oracles import draws


def noisy(logits, noise_std, key, train):
  """Returns H(x), the logits plus noise. noise_std may be None if no noise is drawn."""
  eps = draws.normal(key, np.shape(logits), train)
  std = np.zeros(np.shape(logits)) if noise_std is None else np.asarray(noise_std, np.float64)
  return np.asarray(logits, np.float64) + eps * std


def largest(values, k):
  """Returns the indices of the k largest values, the largest first.

  Among equal values, the lower index comes first.
  """
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def noisy_top_k(logits, context, k=4, noise_floor=0.0, priority="choice"):
  std = (
    noise_floor
    if context.noise_std is None
    else np.asarray(context.noise_std, np.float64) + noise_floor
  )
  h = noisy(logits, np.broadcast_to(std, np.shape(logits)), context.key, context.train)
  bias = np.zeros(h.shape[1]) if context.bias is None else np.asarray(context.bias, np.float64)
  tokens = draws.valid_tokens(logits, context)
  chosen = {t: largest(h[t] + bias, k) for t in tokens}
  gates = {t: draws.softmax(h[t][chosen[t]]) for t in tokens}
  if priority == "gate":
    tokens = sorted(tokens, key=lambda t: (-draws.softmax(h[t])[chosen[t][0]], t))
  pairs = [(t, c) for t in tokens for c in range(k)]
  if priority != "token":
    pairs = [(t, c) for c in range(k) for t in tokens]
  return [(t, chosen[t][c], gates[t][c]) for t, c in pairs]
