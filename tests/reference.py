"""Reference implementations of routing, capacity and experts as plain NumPy loops in float64.

They are written from the papers and share no code with moe_jax. An assignment is a tuple (token,
expert, gate). A plan is a list of assignments in order of priority, without those to no expert.
"""

import numpy as np


def softmax(logits):
  """Returns the softmax over the last axis, in float64."""
  logits = np.asarray(logits, np.float64)
  e = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def top_k(logits, k, gate_norm="top_k", priority="choice", valid=None, bias=None):
  """Returns the plan of token choice (GShard Algorithm 1, Switch Sec. 2.1, V-MoE for "gate")."""
  probs = softmax(logits)
  num_tokens, num_experts = probs.shape
  chosen, gates = {}, {}
  for t in range(num_tokens):
    if valid is not None and not valid[t]:
      continue
    score = [probs[t, e] + (0.0 if bias is None else float(bias[e])) for e in range(num_experts)]
    # Among equal scores, the lower index comes first.
    chosen[t] = sorted(range(num_experts), key=lambda e: (-score[e], e))[:k]
    total = sum(probs[t, e] for e in chosen[t])
    gates[t] = [probs[t, e] / (total if gate_norm == "top_k" else 1.0) for e in chosen[t]]
  tokens = list(chosen)
  if priority == "gate":
    tokens.sort(key=lambda t: (-probs[t, chosen[t][0]], t))
  if priority == "token":
    order = [(t, c) for t in tokens for c in range(k)]
  else:
    order = [(t, c) for c in range(k) for t in tokens]
  return [(t, chosen[t][c], gates[t][c]) for t, c in order]


def expert_choice(logits, capacity_factor, valid=None):
  """Returns the plan in which each expert takes its best C = c*S/E tokens (Zhou et al. 2022)."""
  probs = softmax(logits)
  num_tokens, num_experts = probs.shape
  capacity = min(max(round(capacity_factor * num_tokens / num_experts), 1), num_tokens)
  tokens = [t for t in range(num_tokens) if valid is None or valid[t]]
  plan = []
  for e in range(num_experts):
    # Among equal probabilities, the earlier token comes first.
    best = sorted(tokens, key=lambda t: (-probs[t, e], t))[:capacity]
    plan += [(t, e, probs[t, e]) for t in best]
  return plan


ROUTERS = {"top_k": top_k, "expert_choice": expert_choice}


def drop_overflow(plan, num_experts, capacity):
  """Returns the first `capacity` assignments of each expert, or all if `capacity` is None."""
  count = [0] * num_experts
  kept = []
  for token, expert, gate in plan:
    if capacity is None or count[expert] < capacity:
      kept.append((token, expert, gate))
    # GShard increments the counter "whether or not it fitted".
    count[expert] += 1
  return kept


def swiglu_expert(x, up, gate, down):
  """Returns the output of one expert for one row, down(silu(gate x) * up x)."""
  g = x @ gate
  return (g / (1.0 + np.exp(-g)) * (x @ up)) @ down


def moe(kept, x, weights):
  """Returns y_t, the sum of gate * expert(x_t) over the kept assignments of token t.

  Args:
    kept: The assignments, as `drop_overflow` returns them.
    x: [S, D] The tokens.
    weights: The weights "up", "gate" and "down" of the experts, each with a leading axis E.
  """
  w = {name: np.asarray(leaf, np.float64) for name, leaf in weights.items()}
  x = np.asarray(x, np.float64)
  y = np.zeros_like(x)
  for token, expert, gate in kept:
    y[token] += gate * swiglu_expert(
      x[token], w["up"][expert], w["gate"][expert], w["down"][expert]
    )
  return y


def assignments(plan):
  """Converts a RoutingPlan of one group to a list of assignments, without those to no expert."""
  triples = zip(np.asarray(plan.token), np.asarray(plan.expert), np.asarray(plan.gate), strict=True)
  return [(int(t), int(e), float(g)) for t, e, g in triples if e < plan.num_experts]
