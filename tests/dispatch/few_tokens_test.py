"""`few_tokens` is compared with a dispatcher that computes all rows of all experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.dispatch import einsum, few_tokens
from moe_jax.experts import Experts
from moe_jax.routing import RoutingPlan

pytestmark = pytest.mark.numerics
E, D, F = 4, 6, 8


def layer(tokens, choices, seed=0):
  """Returns a plan of groups of one token, the tokens, and experts.

  Args:
    tokens: The number of tokens.
    choices: The experts of each token, of which E stands for none.
    seed: The seed of the random numbers.
  """
  draw = np.random.default_rng(seed)
  expert = jnp.asarray(choices, jnp.int32).reshape(tokens, -1)
  gate = jnp.where(expert < E, jnp.asarray(draw.uniform(0.1, 1, expert.shape), jnp.float32), 0)
  plan = RoutingPlan(jnp.zeros_like(expert), expert, gate, num_experts=E)

  def random(*shape):
    return jnp.asarray(draw.normal(size=shape), jnp.float32)

  experts = Experts(random(E, D, F), random(E, F, D), random(E, D, F), "swiglu")
  return plan, random(tokens, 1, D), experts


@pytest.mark.parametrize(
  "choices",
  [[[2, 0]], [[1, E], [E, E], [1, 3]], [[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]]],
  ids=["one", "padding", "all"],
)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_equal_to_all_rows_of_all_experts(choices, platform):
  # Catches an expert that is left out or applied twice, gates of other tokens, and padding that
  # gets an output.
  plan, x, experts = layer(len(choices), choices)
  actual = few_tokens(plan, x, experts, None, platform)
  np.testing.assert_allclose(actual, einsum(plan, x, experts, None, "cpu"), rtol=1e-5, atol=1e-5)
  assert not np.any(actual[np.all(np.asarray(choices) == E, axis=1)])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_weights_of_other_experts_are_not_read(platform):
  # Catches a loop over all experts, whose weights take most of the time of a step of decoding.
  plan, x, experts = layer(1, [[2, 0]])
  damaged = jax.tree.map(lambda leaf: leaf.at[jnp.asarray([1, 3])].set(jnp.nan), experts)
  np.testing.assert_array_equal(
    few_tokens(plan, x, damaged, None, platform), few_tokens(plan, x, experts, None, platform)
  )


def test_rows_one_by_one_on_a_cpu():
  # Catches a matmul of all tokens with each chosen expert on a CPU, which takes longer there.
  plan, x, experts = layer(4, [[0, 1], [2, 3], [3, 0], [1, 2]])

  def loops(platform):
    function = functools.partial(few_tokens, capacity=None, platform=platform)
    return str(jax.make_jaxpr(function)(plan, x, experts)).count("while[")

  assert loops("cpu") > loops("gpu")


@pytest.mark.parametrize("sizes", [{"expert": 2, "tensor": 2}, {"data": 2}], ids=str)
@pytest.mark.parametrize("tokens", [3, 4])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_mesh_changes_nothing(sizes, tokens, platform):
  # Catches experts that no device applies, sums that are not added over devices, and tokens that
  # the devices cannot divide among themselves.
  choices = np.random.default_rng(0).permuted(np.tile(np.arange(E), (tokens, 1)), axis=1)[:, :2]
  plan, x, experts = layer(tokens, choices)
  expected = few_tokens(plan, x, experts, None, "cpu")
  with jax.set_mesh(sharding.make_mesh(sizes)):
    actual = jax.jit(lambda *args: few_tokens(*args, None, platform))(plan, x, experts)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
