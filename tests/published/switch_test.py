"""Compares top-1 routing, drops and balance loss with Switch Transformers in transformers."""

import functools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax.numpy as jnp
import numpy as np
from published import compare
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from moe_jax.dispatch import drop_overflow
from moe_jax.routing import RoutingContext, losses
from moe_jax.routing.top_k import top_k

pytestmark = pytest.mark.reference

G, S, E = 3, 32, 8
ROUTER = functools.partial(top_k, k=1, gate_norm="none")


def logits():
  """Returns the logits of G sequences, in which many tokens prefer expert 0."""
  values = compare.draw(G, S, E)
  values[..., 0] += 1.5
  return values


@pytest.mark.parametrize("capacity", [2, 5, S])
def test_choices_gates_and_drops(capacity):
  # The config of transformers has the number of slots per expert, `expert_capacity`, and does not
  # compute it with Eq. 3. The router also returns the probabilities of tokens that it drops, whose
  # one-hot rows are zero, so that they are masked here.
  # Catches drops of other tokens than the last ones, a capacity of the batch and not of a sequence,
  # and gates of 1.
  config = SwitchTransformersConfig(d_model=E, num_experts=E, expert_capacity=capacity)
  router = switch.SwitchTransformersTop1Router(config).eval()
  _, (expert, probability, _) = compare.feed(router, router.classifier.weight, logits())
  plans = [drop_overflow(ROUTER(l, RoutingContext()), capacity) for l in jnp.asarray(logits())]
  for g, plan in enumerate(plans):
    theirs = np.where(expert[g].numpy() == 1, probability[g].detach().numpy(), np.nan)
    compare.assert_same(compare.of_plan(plan, S), theirs)
  dropped = sum(int(jnp.sum(plan.expert == E)) for plan in plans)
  assert (dropped > 0) == (capacity < S)


def test_balance_loss():
  # The loss of first choices before capacity is computed by sequence and then averaged, as in
  # Eqs. 4 to 6. With one choice per token the two losses have the same scale, and our two ways of
  # counting agree.
  # Catches f and P that are averaged over sequences before they are multiplied, and a factor of E.
  values = jnp.asarray(logits())
  theirs = switch.load_balancing_loss_func(
    torch.softmax(torch.tensor(logits()), -1), torch.argmax(torch.tensor(logits()), -1)
  )
  for counts in ("top_1", "all"):
    terms = [losses.balance_terms(l, ROUTER(l, RoutingContext()), None, counts) for l in values]
    ours = np.mean([float(losses.balance(*t)) for t in terms])
    assert float(theirs) == pytest.approx(ours, rel=1e-5) and ours > 1.05
