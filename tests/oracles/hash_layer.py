"""Oracle of hash layers (arXiv 2106.04426), and of the modulo in Expert Choice.

It computes MurmurHash3's 32-bit finaliser with Python integers.
"""

import numpy as np

from oracles import draws


def hash_layer(logits, context, method="random", seed=0):
  num_experts = np.shape(logits)[1]
  plan = []
  for t in draws.valid_tokens(logits, context):
    number = int(context.token_ids[t])
    if method == "random":
      number = mix(number, seed if context.salt is None else mix(int(context.salt), seed))
    plan.append((t, number % num_experts, 1.0))
  return plan


def mix(number, seed):
  return finaliser((number + finaliser((seed + 0x9E3779B9) & 0xFFFFFFFF)) & 0xFFFFFFFF)


def finaliser(h):
  h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
  h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
  return h ^ (h >> 16)
