"""One form for what a router of ours and a published one choose, and how both get the same logits.

Ours are compared with installed packages, not with copies of them: see `make test-reference`.
Without torch and transformers the tests of this folder are skipped.
"""

import numpy as np


def draw(*shape, seed=0):
  """Float32 logits without ties, whose order torch leaves open."""
  return np.random.default_rng(seed).normal(scale=2.0, size=shape).astype(np.float32)


def feed(router, weight, logits):
  """`router` of torch on hidden states that are the logits themselves: its weight becomes the
  identity.

  Args:
    router: a module.
    weight: the router's weight [E, D], D = E.
    logits: [..., E].

  Returns:
    The hidden states, whose gradient is that of the logits, and what the router returns.
  """
  import torch

  with torch.no_grad():
    weight.copy_(torch.eye(logits.shape[-1]))
  hidden = torch.tensor(logits, requires_grad=True)
  return hidden, router(hidden)


def table(token, expert, gate, tokens, num_experts):
  """[S, E]: the gate of each pair (token, expert) that was chosen, NaN for those that were not."""
  chosen = np.full((tokens, num_experts), np.nan)
  token, expert, gate = (np.asarray(a).reshape(-1) for a in (token, expert, gate))
  real = expert < num_experts
  assert np.all(np.isnan(chosen[token[real], expert[real]]))
  chosen[token[real], expert[real]] = gate[real]
  return chosen


def of_plan(plan, tokens):
  """The table of our plan of one group."""
  return table(plan.token, plan.expert, plan.gate, tokens, plan.num_experts)


def of_choices(expert, gate, num_experts):
  """The table of two torch tensors [S, K]."""
  token = np.repeat(np.arange(len(expert)), expert.shape[1])
  return table(token, expert.numpy(), gate.detach().numpy(), len(expert), num_experts)


def assert_same(ours, theirs):
  """The same pairs are chosen, with the same gates."""
  np.testing.assert_array_equal(
    np.isnan(ours), np.isnan(theirs), err_msg="other experts are chosen"
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
