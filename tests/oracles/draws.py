"""The random numbers that a router draws from its key, for oracles."""

import jax
import numpy as np


def normal(key, shape, train=True):
  """Standard normal; zeros where the router draws nothing: without a key, or outside training."""
  return (
    np.zeros(shape)
    if key is None or not train
    else np.asarray(jax.random.normal(key, shape), np.float64)
  )


def uniform(key, shape):
  """In [0, 1)."""
  return np.asarray(jax.random.uniform(key, shape), np.float64)


def valid_tokens(logits, context):
  """The positions of real tokens."""
  return [t for t in range(len(logits)) if context.valid is None or bool(context.valid[t])]


def softmax(values):
  values = np.asarray(values, np.float64)
  e = np.exp(values - values.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)
