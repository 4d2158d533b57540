"""The random numbers that routers draw from their keys, and other helpers of the oracles."""

import jax
import numpy as np


def normal(key, shape, train=True):
  """Returns standard normal numbers, or zeros without a key or outside training.

  In the latter cases the router draws nothing.
  """
  return (
    np.zeros(shape)
    if key is None or not train
    else np.asarray(jax.random.normal(key, shape), np.float64)
  )


def uniform(key, shape):
  """Returns uniform numbers in [0, 1)."""
  return np.asarray(jax.random.uniform(key, shape), np.float64)


def valid_tokens(logits, context):
  """Returns the positions of real tokens."""
  return [t for t in range(len(logits)) if context.valid is None or bool(context.valid[t])]


def softmax(values):
  """Returns the softmax over the last axis in float64."""
  values = np.asarray(values, np.float64)
  e = np.exp(values - values.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)
