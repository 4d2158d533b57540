"""Tests that the forms in which experts can be applied agree, as dispatchers expect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import ExpertFunction
from moe_jax.experts import Experts

pytestmark = pytest.mark.unit


def test_all_forms_agree():
  # Catches a form of the experts that transposes, omits the gate or uses the weights of another
  # expert, and a renamed method.
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  experts = Experts(
    up=normal(2, 3, 4), gate=normal(2, 3, 4), down=normal(2, 4, 3), activation="swiglu"
  )
  x = normal(2, 5, 3)
  assert isinstance(experts, ExpertFunction) and experts.num_experts == 2
  together = experts.buffers(x)
  for e in range(2):
    w = jax.tree.map(lambda leaf, e=e: leaf[e], experts.weights)
    np.testing.assert_allclose(
      experts.output(w, experts.hidden(w, x[e])), together[e], rtol=1e-5, atol=1e-6
    )
  ragged = experts.ragged(jnp.concatenate([x[0, :4], x[1, :2]]), jnp.array([4, 2]))
  np.testing.assert_allclose(
    ragged, jnp.concatenate([together[0, :4], together[1, :2]]), rtol=1e-5, atol=1e-6
  )
