"""Oracle of the dense mixture (Jacobs et al. 1991), in which every expert gets every token."""

import numpy as np

from oracles import draws


def adaptive_mixture(logits, context):
  plan = []
  for t in draws.valid_tokens(logits, context):
    exponentials = [np.exp(np.float64(x)) for x in logits[t]]
    plan += [(t, e, value / sum(exponentials)) for e, value in enumerate(exponentials)]
  return plan
