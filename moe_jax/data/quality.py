"""A classifier of text quality, and the rule by which documents are kept (GLaM, GPT-3).

GLaM (Du et al. 2021, arXiv 2112.06905) Sec. 3 trains "a feature hash based linear classifier" to
tell curated text from other web pages, and keeps pages by "sampling using a Pareto distribution
based on the score", after GPT-3 (Brown et al. 2020, arXiv 2005.14165), appendix A. The papers state
neither the features nor the regularisation; those here are ours.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from moe_jax.data.documents import uniform

# The number of features to which words and pairs of words are hashed.
FEATURES = 2**18
ALPHA = 9.0  # GPT-3's exponent of the Pareto distribution
_WORD = re.compile(r"\w+")
# The weight of the squared norm of the weights in the sum over documents.
_L2 = 1.0


def features(documents: Sequence[bytes]):
  """Returns the features of documents as a sparse SciPy matrix [D, FEATURES] of unit rows.

  A feature is the hash of a word in lower case, or of two adjacent ones. Its value is
  log(1 + count), divided by the norm of the document's values. A document without words is 0.
  """
  # Imported here because only filters need it.
  from scipy.sparse import csr_matrix

  columns, values, ends = [], [], [0]
  for document in documents:
    words = _WORD.findall(document.decode("utf-8", "replace").lower())
    pairs = [f"{one} {two}" for one, two in zip(words, words[1:], strict=False)]
    hashes = [zlib.crc32(part.encode()) % FEATURES for part in [*words, *pairs]]
    column, count = np.unique(np.array(hashes, np.int64), return_counts=True)
    value = np.log1p(count)
    columns.append(column)
    values.append(value / max(np.linalg.norm(value), 1e-30))
    ends.append(ends[-1] + len(column))
  shape = (len(documents), FEATURES)
  return csr_matrix((np.concatenate(values), np.concatenate(columns), ends), shape=shape)


class Classifier:
  """A logistic regression that tells documents of one kind from others.

  Both kinds have the same weight in training, whatever their numbers of documents. The weights
  minimise the loss exactly (L-BFGS), so that the same documents always give the same classifier.

  Args:
    positive: Documents of the kind, at least one.
    negative: Other documents, at least one.
  """

  def __init__(self, positive: Sequence[bytes], negative: Sequence[bytes]):
    from scipy.optimize import minimize

    x = features([*positive, *negative])
    sign = np.repeat([1.0, -1.0], [len(positive), len(negative)])
    total = len(sign)
    weight = np.where(sign > 0, total / (2 * len(positive)), total / (2 * len(negative)))

    def loss(parameters):
      w, b = parameters[:-1], parameters[-1]
      margin = sign * (x @ w + b)
      # d/dm log(1 + exp(-m)) is -1 / (1 + exp(m)).
      slope = -weight * sign / (1 + np.exp(np.minimum(margin, 700.0)))
      value = np.sum(weight * np.logaddexp(0.0, -margin)) + 0.5 * _L2 * w @ w
      return value, np.append(x.T @ slope + _L2 * w, slope.sum())

    found = minimize(loss, np.zeros(FEATURES + 1), jac=True, method="L-BFGS-B")
    self._weights, self._bias = found.x[:-1], found.x[-1]

  def scores(self, documents: Sequence[bytes]) -> Float[np.ndarray, "D"]:
    """Returns the probability of each document that it is of the kind, in (0, 1)."""
    margin = features(documents) @ self._weights + self._bias
    return 1 / (1 + np.exp(-np.clip(margin, -700.0, 700.0)))


def roc_area(positive: Float[np.ndarray, "P"], negative: Float[np.ndarray, "N"]) -> float:
  """Returns the area under the ROC curve of scores.

  It is the probability that a positive document scores above a negative one, where equal scores
  count half: 0.5 by chance, 1 for perfect separation.

  Args:
    positive: Scores of documents of the kind, at least one.
    negative: Scores of other documents, at least one.
  """
  ordered = np.sort(negative)
  below = np.searchsorted(ordered, positive, "left")
  not_above = np.searchsorted(ordered, positive, "right")
  return float(np.mean(below + not_above) / (2 * len(negative)))


def pareto_keeps(
  scores: Float[np.ndarray, "D"], keys: Sequence[str], alpha: float = ALPHA, seed: int = 0
) -> Bool[np.ndarray, "D"]:
  """Returns which documents are kept: those whose Pareto draw is above 1 - score.

  The draw X of GPT-3 (`numpy.random.pareto`) has P(X > x) = (1 + x)^-alpha for x >= 0, so that a
  document is kept with probability (2 - score)^-alpha: always at score 1, and with alpha = 9 in
  2.6 % of the cases at 0.5 and in 0.2 % at 0. Some documents of low score stay in, because the
  classifier may be wrong about them.

  Args:
    scores: The score of each document, in [0, 1].
    keys: The key of each document, on which its draw depends, beside the seed.
    alpha: The exponent, above 0. A larger one keeps fewer documents.
    seed: The seed of the draws.
  """
  u = np.array([uniform(f"pareto {seed} {key}") for key in keys])
  return (1 - u) ** (-1 / alpha) - 1 > 1 - np.asarray(scores)
