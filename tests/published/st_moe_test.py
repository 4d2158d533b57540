"""ST-MoE as in st-moe-pytorch, which transcribes Mesh-TensorFlow's router."""

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
  """In training mode: outside training it reports no losses, and it draws random numbers all the
  same."""
  return TopNGating(
    E, num_gates=E, top_n=k, threshold_train=threshold, capacity_factor_train=factor
  ).train()


def ours(values, key, k, threshold):
  return st_moe(values, RoutingContext(key=key, train=True), k=k, threshold=threshold)


def share_draws(monkeypatch, k):
  """torch draws [K, G, S] numbers where the router draws its own [S, K] from each group's key: it
  gets the latter."""
  draws = np.stack([jax.random.uniform(key, (S, k)) for key in KEYS])
  draws = torch.tensor(np.moveaxis(draws, -1, 0).copy())
  monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low=0.0, high=1.0: self.copy_(draws))


@pytest.mark.parametrize("factor", [1.25, 8.0])
@pytest.mark.parametrize("k, threshold", [(2, 0.2), (2, 0.6), (3, 0.5), (2, 1e-6)])
def test_slots_gates_and_their_gradient(monkeypatch, k, threshold, factor):
  # Which token sits in which slot, with which gate. Only the combine tensor is compared: to the
  # dispatch tensor theirs adds the combine tensor's gradient (`straight_through_dispatch_tensor`),
  # which is in no paper. Catches: gates normalised over the kept choices instead of over the best
  # K, skipped choices that keep their slot, a second choice served before a later token's first,
  # the random test reversed.
  capacity = expert_capacity(S, E, k * S, factor, "tokens", 4, "down")  # Mesh-TensorFlow's rule
  gate = gating(k, threshold, factor)  # draws its initial weights, so before the draws are shared
  share_draws(monkeypatch, k)
  hidden, (_, combine, *_) = compare.feed(gate, gate.to_gates.weight, LOGITS)
  assert combine.shape == (G, S, E, capacity)

  def plan(values, key):
    return drop_overflow(ours(values, key, k, threshold), capacity)

  for g in range(G):
    kept = plan(jnp.asarray(LOGITS[g]), KEYS[g])
    token, gates = slots(kept, capacity, S)
    expected = np.zeros((S + 1, E, capacity))  # the last row: empty slots
    expected[np.asarray(token), np.arange(E)[:, None], np.arange(capacity)] = gates
    np.testing.assert_allclose(combine[g].detach().numpy(), expected[:S], rtol=1e-5, atol=1e-7)
    if threshold == 0.6 and factor == 8.0:  # or the draws would be no test
      assert 0.1 < float(jnp.mean(kept.expert[S:] == E)) < 0.9
  torch.sum(torch.sin(3 * combine)).backward()

  def total(values):
    return sum(jnp.sum(jnp.sin(3 * plan(values[g], KEYS[g]).gate)) for g in range(G))

  np.testing.assert_allclose(
    jax.grad(total)(jnp.asarray(LOGITS)), hidden.grad, rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize("factor", [8.0, 1.25])
def test_losses(factor):
  # Of first choices, by sequence; E^2 times the mean over experts of f P is E times the sum. At
  # factor 8 nobody is dropped and the two agree. Below, theirs sees only the first choices that
  # found a slot: `mask_1` is a view of the mask, which is multiplied in place afterwards. Neither
  # ST-MoE nor Mesh-TensorFlow does that, and a loss that stops growing where an expert overflows is
  # no balance loss; f is cut in the same way here to compare the rest. Catches: f of all choices, f
  # and P averaged over sequences first, f after capacity.
  values = (
    LOGITS + 2 * np.eye(E, dtype=np.float32)[:G, None]
  )  # each sequence prefers an expert of its own
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
