"""Oracle of GShard (arXiv 2006.16668, Algorithm 1), and of Mesh-TensorFlow's variant of it."""

import numpy as np

from oracles import draws


def gshard(logits, context, second_policy="random", threshold=0.5, skipped_keeps_slot=True):
  first, second = [], []
  for token, (e1, g1), (e2, g2), kept in _choices(logits, context, second_policy, threshold):
    first.append((token, e1, g1))
    if kept:
      second.append((token, e2, g2))
    elif skipped_keeps_slot:
      second.append((token, e2, 0.0))
  return first + second


def algorithm_1(logits, context, capacity):
  """Returns the (token, expert) pairs that are dispatched with C slots per expert in the paper.

  The counters grow whether or not a token is dispatched.
  """
  choices = list(_choices(logits, context, "random", 0.5))
  count = np.zeros(np.shape(logits)[1], int)
  dispatched = []
  for token, (e1, _), _, _ in choices:
    if count[e1] < capacity:
      dispatched.append((token, e1))
    count[e1] += 1
  for token, _, (e2, _), kept in choices:
    if count[e2] < capacity and kept:
      dispatched.append((token, e2))
    count[e2] += 1
  return dispatched


def mesh_tensorflow(logits, context, capacity, threshold):
  """Returns the (token, expert) pairs that are dispatched in Mesh-TensorFlow.

  Second choices that are kept take slots after the first choices that were served.
  """
  choices = list(_choices(logits, context, "random", threshold))
  served = {e: [] for e in range(np.shape(logits)[1])}
  for token, (e1, _), _, _ in choices:
    if len(served[e1]) < capacity:
      served[e1].append((token, e1))
  for token, _, (e2, _), kept in choices:
    if kept and len(served[e2]) < capacity:
      served[e2].append((token, e2))
  return [pair for e in served for pair in served[e]]


def _choices(logits, context, second_policy, threshold):
  """Yields (token, (e1, g1), (e2, g2), whether the second choice is kept) of each real token."""
  probs = draws.softmax(logits)
  is_random = second_policy == "random" and context.train and context.key is not None
  r = draws.uniform(context.key, (len(probs),)) if is_random else np.zeros(len(probs))
  for token in draws.valid_tokens(logits, context):
    e1 = int(np.argmax(probs[token]))
    e2 = int(np.argmax([-1.0 if e == e1 else p for e, p in enumerate(probs[token])]))
    p1, p2 = probs[token, e1], probs[token, e2]
    g1, g2 = p1 / (p1 + p2), p2 / (p1 + p2)
    kept = {
      "random": r[token] < g2 / threshold,
      "threshold": g2 > threshold,
      "all": True,
      "none": False,
    }
    yield token, (e1, g1), (e2, g2), kept[second_policy]
