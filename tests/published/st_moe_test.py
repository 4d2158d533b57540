"""Compares `st_moe` with st-moe-pytorch, which is a port of Mesh-TensorFlow's router."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("st_moe_pytorch")

import jax
import jax.numpy as jnp
import numpy as np
from published import compare
from st_moe_pytorch.st_moe_pytorch import TopNGating

from moe_jax.dispatch import drop_overflow, expert_capacity
from moe_jax.dispatch.capacity import slots
from moe_jax.routing import RoutingContext, losses
from moe_jax.routing.st_moe import st_moe

pytestmark = pytest.mark.reference

G, S, E = 2, 40, 8
KEYS = jax.random.split(jax.random.key(3), G)
LOGITS = compare.draw(G, S, E, seed=5) / 2


def gating(k, threshold, factor):
  """Returns the router of st-moe-pytorch in training mode.

  Outside training it returns no losses, but still draws random numbers.
  """
  return TopNGating(
    E, num_gates=E, top_n=k, threshold_train=threshold, capacity_factor_train=factor
  ).train()


def ours(values, key, k, threshold):
  """Returns the plan of our router in training."""
  return st_moe(values, RoutingContext(key=key, train=True), k=k, threshold=threshold)


def share_draws(monkeypatch, k):
  """Makes torch return the random numbers that our router draws from the keys of the groups.

  The router in torch draws numbers of shape [K, G, S], and ours draws [S, K] for each group.
  """
  draws = np.stack([jax.random.uniform(key, (S, k)) for key in KEYS])
  draws = torch.tensor(np.moveaxis(draws, -1, 0).copy())
  monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low=0.0, high=1.0: self.copy_(draws))


@pytest.mark.parametrize("factor", [1.25, 8.0])
@pytest.mark.parametrize("k, threshold", [(2, 0.2), (2, 0.6), (3, 0.5), (2, 1e-6)])
def test_slots_gates_and_their_gradient(monkeypatch, k, threshold, factor):
  # Compares the token of each slot and its gate. Only the combine tensor is compared, because
  # st-moe-pytorch adds the gradient of the combine tensor to the dispatch tensor
  # (`straight_through_dispatch_tensor`), which is in no paper.
  # Catches gates that are normalised over the kept choices and not over the best K, skipped choices
  # that keep their slot, a second choice that is served before the first choice of a later token,
  # and a random test that is reversed.

  # The capacity follows the rule of Mesh-TensorFlow.
  capacity = expert_capacity(S, E, k * S, factor, "tokens", 4, "down")
  # The router draws its initial weights, so it is created before `share_draws`.
  gate = gating(k, threshold, factor)
  share_draws(monkeypatch, k)
  hidden, (_, combine, *_) = compare.feed(gate, gate.to_gates.weight, LOGITS)
  assert combine.shape == (G, S, E, capacity)

  def plan(values, key):
    return drop_overflow(ours(values, key, k, threshold), capacity)

  for g in range(G):
    kept = plan(jnp.asarray(LOGITS[g]), KEYS[g])
    token, gates = slots(kept, capacity, S)
    # Empty slots have the token index S, so that they are written to an extra row.
    expected = np.zeros((S + 1, E, capacity))
    expected[np.asarray(token), np.arange(E)[:, None], np.arange(capacity)] = gates
    np.testing.assert_allclose(combine[g].detach().numpy(), expected[:S], rtol=1e-5, atol=1e-7)
    # The random numbers matter only if some of the second choices are skipped, but not all.
    if threshold == 0.6 and factor == 8.0:
      assert 0.1 < float(jnp.mean(kept.expert[S:] == E)) < 0.9
  torch.sum(torch.sin(3 * combine)).backward()

  def total(values):
    return sum(jnp.sum(jnp.sin(3 * plan(values[g], KEYS[g]).gate)) for g in range(G))

  np.testing.assert_allclose(
    jax.grad(total)(jnp.asarray(LOGITS)), hidden.grad, rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize("factor", [8.0, 1.25])
def test_losses(factor):
  # The loss counts first choices by sequence. st-moe-pytorch computes E^2 times the mean of f P
  # over experts, which is E times the sum. At factor 8 nothing is dropped and the two losses agree.
  # At lower factors st-moe-pytorch only counts the first choices that found a slot, because
  # `mask_1` is a view of the mask, which is multiplied in place afterwards. Neither ST-MoE nor
  # Mesh-TensorFlow does that, and a loss that stops growing when an expert overflows does not
  # balance. To compare the rest, f is cut in the same way here.
  # Catches f of all choices, f and P that are averaged over sequences first, and f after capacity.

  # Each sequence prefers another expert.
  values = LOGITS + 2 * np.eye(E, dtype=np.float32)[:G, None]
  gate = gating(2, 0.2, factor)
  _, (_, combine, balance, z) = compare.feed(gate, gate.to_gates.weight, values)
  expected = []
  for l, key in zip(jnp.asarray(values), KEYS, strict=True):
    plan = ours(l, key, 2, 0.2)
    f, p = losses.balance_terms(l, plan, None, "top_1")
    kept = np.bincount(drop_overflow(plan, combine.shape[-1]).expert[:S], minlength=E + 1)[:E] / S
    assert np.allclose(kept, f) == (factor == 8.0)
    expected.append(float(losses.balance(jnp.asarray(kept), p)))
  assert balance.item() == pytest.approx(np.mean(expected), rel=1e-5)
  assert factor < 8.0 or balance.item() > 1.2
  assert z.item() == pytest.approx(
    np.mean([float(losses.z(l, None)) for l in jnp.asarray(values)]), rel=1e-5
  )
