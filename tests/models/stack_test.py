"""Blocks: the order of what they add, and what a stack of them gives each layer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.layers import Aux, LayerContext, LayerRouting
from moe_jax.models.stack import Block, balancing_bias, run_layers

pytestmark = pytest.mark.unit


class Add(nn.Module):
  """x -> constant; with `memory`, plus the sum of what it is given; as an FFN, plus the bias it is given."""

  amount: float
  log: Callable  # gets (name, input)

  @nn.compact
  def __call__(self, x, context, *given):
    self.log((self.name, x[0, 0, 0]))
    y = jnp.full_like(x, self.amount)
    if self.name == "cross_attention":
      return y + jnp.sum(given[0]) + jnp.sum(given[1])
    if self.name not in ("ffn", "extra"):
      return y
    bias = given[0].bias if given and given[0] is not None and given[0].bias is not None else jnp.zeros(1)
    return y + bias[0], Aux(metrics={"bias": bias} if given and given[0] is not None else {})


class Same(nn.Module):

  def __call__(self, x):
    return x


CONTEXT = LayerContext(*[jnp.ones((1, 2), jnp.int32)] * 3, memory=jnp.full((1, 3, 1), 100.0),
                       memory_segments=jnp.ones((1, 3), jnp.int32))


def block(log, **parts):
  make = lambda amount: functools.partial(Add, amount, log.append)
  return functools.partial(Block, attention=make(1.0), ffn=make(8.0), norm=Same,
                           **{name: make(amount) for name, amount in parts.items()})


@pytest.mark.parametrize("parts, order, out", [
    ({}, ["attention", "ffn"], 9.0),
    ({"cross": 2.0}, ["attention", "cross_attention", "ffn"], 9.0 + 2.0 + 303.0),
    ({"extra": 4.0}, ["attention", "extra", "ffn"], 13.0),
    ({"cross": 2.0, "extra": 4.0}, ["attention", "cross_attention", "extra", "ffn"], 15.0 + 303.0)])
def test_order_of_a_block(parts, order, out):
  # Catches: a sublayer that is left out or comes too early, one without its residual, a memory that does not reach it.
  log = []
  y, _ = block(log, **parts)().apply({}, jnp.zeros((1, 2, 1)), CONTEXT)
  assert [name for name, _ in log] == order
  np.testing.assert_array_equal(y, np.full((1, 2, 1), out))
  assert [x for _, x in log] == sorted(x for _, x in log) and log[0][1] == 0.0 and log[1][1] == 1.0


class Model(nn.Module):
  has_experts: tuple

  @nn.compact
  def __call__(self, x):
    bias = balancing_bias(self, sum(self.has_experts), 1)
    return run_layers(lambda experts, scanned: block([]), self.has_experts, False, x, CONTEXT, LayerRouting(bias))


def test_layers_take_their_rows_in_order():
  # Catches: the row of another layer, a layer without experts that takes one, a bias that does not start at 0.
  model = Model((False, True, False, True))
  x = jnp.zeros((1, 2, 1))
  variables = model.init(jax.random.key(0), x)
  np.testing.assert_array_equal(variables["router_state"]["bias"], np.zeros((2, 1)))
  y, aux = model.apply({"router_state": {"bias": jnp.asarray([[100.0], [1000.0]])}}, x)
  np.testing.assert_array_equal(y, np.full((1, 2, 1), 4 * 9.0 + 1100.0))
  np.testing.assert_array_equal(aux.metrics["bias"], [[100.0], [1000.0]])
