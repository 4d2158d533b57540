"""Oracle of hierarchical routing and of its smooth load (Shazeer et al. 2017, appendix B)."""

import jax
import numpy as np
from scipy.stats import norm

from oracles import draws
from oracles.noisy_top_k import largest, noisy


def _both_levels(logits, context):
  """Returns the noisy logits of the groups and of the experts."""
  keys = [
    None if context.key is None else jax.random.fold_in(context.key, level) for level in (0, 1)
  ]
  return (
    noisy(context.primary, context.primary_noise_std, keys[0], context.train),
    noisy(logits, context.noise_std, keys[1], context.train),
  )


def hierarchical(logits, context, groups=4, primary_k=2, k=2, priority="choice"):
  primary, h = _both_levels(logits, context)
  size = h.shape[1] // groups
  tokens = draws.valid_tokens(logits, context)
  choices, score = {}, {}
  for t in tokens:
    choices[t] = []
    picked = largest(primary[t], primary_k)
    for i, g_primary in zip(picked, draws.softmax(primary[t][picked]), strict=True):
      inside = h[t][i * size : (i + 1) * size]
      kept = largest(inside, k)
      choices[t] += [
        (i * size + j, g_primary * g)
        for j, g in zip(kept, draws.softmax(inside[kept]), strict=True)
      ]
    first = h[t][picked[0] * size : (picked[0] + 1) * size]
    score[t] = draws.softmax(primary[t])[picked[0]] * draws.softmax(first)[largest(first, 1)[0]]
  if priority == "gate":
    tokens = sorted(tokens, key=lambda t: (-score[t], t))
  pairs = [(t, c) for t in tokens for c in range(primary_k * k)]
  if priority != "token":
    pairs = [(t, c) for c in range(primary_k * k) for t in tokens]
  return [(t, *choices[t][c]) for t, c in pairs]


def _chosen(clean, h, std, k, i):
  """Returns P(x, i), the probability that i is among the k largest if its noise is redrawn."""
  others = sorted((value for j, value in enumerate(h) if j != i), reverse=True)
  return 1.0 if k == len(h) else norm.cdf((clean[i] - others[k - 1]) / std[i])


def load(logits, context, groups, primary_k, k):
  """Returns CV^2 of Load_{i,j} = Load_primary_i * Load_i(X^(i))_j / |X^(i)|."""
  primary, h = _both_levels(logits, context)
  std, primary_std = (
    np.asarray(context.noise_std, np.float64),
    np.asarray(context.primary_noise_std, np.float64),
  )
  clean, size = np.asarray(context.primary, np.float64), h.shape[1] // groups
  tokens = draws.valid_tokens(logits, context)
  loads = []
  for i in range(groups):
    experts = slice(i * size, (i + 1) * size)
    load_primary = sum(_chosen(clean[t], primary[t], primary_std[t], primary_k, i) for t in tokens)
    reached = [t for t in tokens if i in largest(primary[t], primary_k)]
    for j in range(size):
      inside = sum(
        _chosen(logits[t][experts], h[t][experts], std[t][experts], k, j) for t in reached
      )
      loads.append(load_primary * inside / len(reached) if reached else 0.0)
  return np.var(loads) / np.mean(loads) ** 2 if np.mean(loads) > 0 else 0.0
