"""Helpers that give the same logits to our routers and published ones, and compare their choices.

The published routers are those of installed packages and not copies of them, see `make
test-reference`. Without torch and transformers, the tests in this folder are skipped.
"""

import numpy as np


def draw(*shape, seed=0):
  """Returns float32 logits without ties, because torch does not define the order of equal ones."""
  return np.random.default_rng(seed).normal(scale=2.0, size=shape).astype(np.float32)


def feed(router, weight, logits):
  """Applies a torch router to these logits.

  The weight of the router is set to the identity, so that its logits are its inputs.

  Args:
    router: The module.
    weight: [E, D] The weight of the router, with D = E.
    logits: [..., E] The logits.

  Returns:
    The input of the router, whose gradient is that of the logits, and the output of the router.
  """
  import torch

  with torch.no_grad():
    weight.copy_(torch.eye(logits.shape[-1]))
  hidden = torch.tensor(logits, requires_grad=True)
  return hidden, router(hidden)


def table(token, expert, gate, tokens, num_experts):
  """Returns [S, E], the gate of each chosen pair (token, expert) and NaN for all other pairs."""
  chosen = np.full((tokens, num_experts), np.nan)
  token, expert, gate = (np.asarray(a).reshape(-1) for a in (token, expert, gate))
  real = expert < num_experts
  assert np.all(np.isnan(chosen[token[real], expert[real]]))
  chosen[token[real], expert[real]] = gate[real]
  return chosen


def of_plan(plan, tokens):
  """Returns the table of a plan of one group."""
  return table(plan.token, plan.expert, plan.gate, tokens, plan.num_experts)


def of_choices(expert, gate, num_experts):
  """Returns the table of two torch tensors [S, K]."""
  token = np.repeat(np.arange(len(expert)), expert.shape[1])
  return table(token, expert.numpy(), gate.detach().numpy(), len(expert), num_experts)


def assert_same(ours, theirs):
  """Checks that two tables choose the same pairs with the same gates."""
  np.testing.assert_array_equal(
    np.isnan(ours), np.isnan(theirs), err_msg="other experts are chosen"
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
