"""The oracle: routing, capacity and experts as plain NumPy loops in float64, written from the
papers, sharing no code.

An assignment is a tuple (token, expert, gate); a plan is a list of them in priority order, without
those that name nobody.
"""

import numpy as np


def softmax(logits):
  logits = np.asarray(logits, np.float64)
  e = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def top_k(logits, k, gate_norm="top_k", priority="choice", valid=None, bias=None):
  """Token choice: GShard Algorithm 1, Switch Sec. 2.1; V-MoE's batch priority."""
  probs = softmax(logits)
  num_tokens, num_experts = probs.shape
  chosen, gates = {}, {}
  for t in range(num_tokens):
    if valid is not None and not valid[t]:
      continue
    score = [probs[t, e] + (0.0 if bias is None else float(bias[e])) for e in range(num_experts)]
    chosen[t] = sorted(range(num_experts), key=lambda e: (-score[e], e))[
      :k
    ]  # ties: the lower index
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
  """Zhou et al. 2022: each expert takes its best C = c*S/E tokens."""
  probs = softmax(logits)
  num_tokens, num_experts = probs.shape
  capacity = min(max(round(capacity_factor * num_tokens / num_experts), 1), num_tokens)
  tokens = [t for t in range(num_tokens) if valid is None or valid[t]]
  plan = []
  for e in range(num_experts):
    best = sorted(tokens, key=lambda t: (-probs[t, e], t))[:capacity]  # ties: the earlier token
    plan += [(t, e, probs[t, e]) for t in best]
  return plan


ROUTERS = {"top_k": top_k, "expert_choice": expert_choice}


def drop_overflow(plan, num_experts, capacity):
  """The first `capacity` assignments of each expert (None: all)."""
  count = [0] * num_experts
  kept = []
  for token, expert, gate in plan:
    if capacity is None or count[expert] < capacity:
      kept.append((token, expert, gate))
    count[expert] += 1  # GShard: "whether or not it fitted"
  return kept


def swiglu_expert(x, up, gate, down):
  """One expert on one row: down(silu(gate x) * up x)."""
  g = x @ gate
  return (g / (1.0 + np.exp(-g)) * (x @ up)) @ down


def moe(kept, x, weights):
  """y_t = sum of gate * expert(x_t) over the kept assignments of t. weights: {"up", "gate",
  "down"}, leading axis E."""
  w = {name: np.asarray(leaf, np.float64) for name, leaf in weights.items()}
  x = np.asarray(x, np.float64)
  y = np.zeros_like(x)
  for token, expert, gate in kept:
    y[token] += gate * swiglu_expert(
      x[token], w["up"][expert], w["gate"][expert], w["down"][expert]
    )
  return y


def assignments(plan):
  """A RoutingPlan of one group as a list of (token, expert, gate), without those that name
  nobody."""
  triples = zip(np.asarray(plan.token), np.asarray(plan.expert), np.asarray(plan.gate), strict=True)
  return [(int(t), int(e), float(g)) for t, e, g in triples if e < plan.num_experts]
