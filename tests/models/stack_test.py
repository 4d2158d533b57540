"""Tests the order of the sublayers of a block, and what a stack of layers gives to each layer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from changed import config
from decoder_inputs import make, packed
from flax import linen as nn

from moe_jax import assembly, sharding
from moe_jax.dispatch.size_classes import layout
from moe_jax.layers import Aux, LayerContext, LayerRouting
from moe_jax.models.stack import balancing_bias, layer_salts, run_layers
from moe_jax.models.transformer import Block
from moe_jax.routing.hash_layer import mix

pytestmark = pytest.mark.unit


class Add(nn.Module):
  """A sublayer that returns the constant `amount`.

  Cross-attention adds the sums of the memory and its segments, and an FFN adds the balancing bias.

  Attributes:
    amount: The constant.
    log: Called with (name of the sublayer, its input).
  """

  amount: float
  log: Callable

  @nn.compact
  def __call__(self, x, context, *rest):
    self.log((self.name, x[0, 0, 0]))
    y = jnp.full_like(x, self.amount)
    if self.name == "cross_attention":
      memory, memory_segments = rest
      return y + jnp.sum(memory) + jnp.sum(memory_segments)
    if self.name not in ("ffn", "extra"):
      return y
    routing = rest[0] if rest else None
    bias = jnp.zeros(1) if routing is None or routing.bias is None else routing.bias
    return y + bias[0], Aux(metrics={} if routing is None else {"bias": bias})


class Same(nn.Module):
  def __call__(self, x):
    return x


CONTEXT = LayerContext(
  *[jnp.ones((1, 2), jnp.int32)] * 3,
  memory=jnp.full((1, 3, 1), 100.0),
  memory_segments=jnp.ones((1, 3), jnp.int32),
)


def block(log, **parts):
  def make(amount):
    return functools.partial(Add, amount, log.append)

  return functools.partial(
    Block,
    attention=make(1.0),
    ffn=make(8.0),
    norm=Same,
    **{name: make(amount) for name, amount in parts.items()},
  )


@pytest.mark.parametrize(
  "parts, order, out",
  [
    ({}, ["attention", "ffn"], 9.0),
    ({"cross": 2.0}, ["attention", "cross_attention", "ffn"], 9.0 + 2.0 + 303.0),
    ({"extra": 4.0}, ["attention", "extra", "ffn"], 13.0),
    ({"cross": 2.0, "extra": 4.0}, ["attention", "cross_attention", "extra", "ffn"], 15.0 + 303.0),
  ],
)
def test_order_of_a_block(parts, order, out):
  # Catches a sublayer that is left out, comes too early or has no residual, and a memory that does
  # not reach the cross-attention.
  log = []
  y, _ = block(log, **parts)().apply({}, jnp.zeros((1, 2, 1)), CONTEXT)
  assert [name for name, _ in log] == order
  np.testing.assert_array_equal(y, np.full((1, 2, 1), out))
  assert [x for _, x in log] == sorted(x for _, x in log) and log[0][1] == 0.0 and log[1][1] == 1.0


class Model(nn.Module):
  has_experts: tuple

  @nn.compact
  def __call__(self, x):
    bias = balancing_bias(self, sum(self.has_experts), 1, ("bias",))
    return run_layers(
      lambda experts, scanned: block([]), self.has_experts, False, x, CONTEXT, LayerRouting(bias)
    )


def test_layers_take_their_rows_in_order():
  # Catches the row of another layer, a layer without experts that takes a row, and a bias that does
  # not start at 0.
  model = Model((False, True, False, True))
  x = jnp.zeros((1, 2, 1))
  variables = model.init(jax.random.key(0), x)
  np.testing.assert_array_equal(variables["router_state"]["bias"], np.zeros((2, 1)))
  y, aux = model.apply({"router_state": {"bias": jnp.asarray([[100.0], [1000.0]])}}, x)
  np.testing.assert_array_equal(y, np.full((1, 2, 1), 4 * 9.0 + 1100.0))
  np.testing.assert_array_equal(aux.metrics["bias"], [[100.0], [1000.0]])


def test_salts_differ_by_layer_and_seed():
  # Catches a salt that does not depend on the seed or on the layer, and the sum of the two, with
  # which layer 1 of seed 0 would equal layer 0 of seed 1. Catches another salt for a traced seed,
  # which occurs when several seeds are trained together.
  salts = np.stack([layer_salts(seed, 64) for seed in (*range(20), 2**31, 2**32 - 1)])
  assert salts.dtype == np.uint32 and len(np.unique(salts)) == salts.size
  traced = jax.vmap(lambda seed: layer_salts(seed, 64))(jnp.arange(20))
  np.testing.assert_array_equal(traced, salts[:20])
  np.testing.assert_array_equal(layer_salts(3, 2), layer_salts(3, 64)[:2])


HASH = {"moe__router__name": "hash_layer", "moe__first": 0, "moe__every": 1, "num_layers": 2}
MODELS = {
  "scanned": HASH,
  "unrolled": HASH | {"scan_layers": False},
  "rematerialised": HASH | {"remat": "full"},
  "mixed": HASH | {"num_layers": 5, "moe__first": 1, "moe__every": 2},
  "lstm": HASH | {"family": "lstm"},
  "brainformer": HASH
  | {"family": "brainformer", "num_layers": 1, "block": ("moe", "attention", "moe")},
}


def chosen(model, batch):
  """Returns a function from a seed to each token's first expert, [Lm, B, L], at evaluation.

  If no weight influences the choice, XLA computes little else.
  """
  return tiny.quick_jit(
    lambda seed: tiny.at_first(
      model.clone(seed=seed), jax.random.key(0), *batch, train=False, return_routing=True
    )[1].metrics["top1_expert"]
  )


@pytest.mark.numerics
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_its_own_hash(name):
  # The test computes the choices of each layer from the ids, the layer's index among the layers
  # with experts, and the seed. Catches one hash for all layers or repetitions, rows of the wrong
  # layer in a scan, and a seed that the model ignores.
  model, batch = make(**MODELS[name]), packed([[3, 5], [8]])
  hashes = [mix(batch[0], mix(salt, 0)) % 4 for salt in layer_salts(3, 2)]
  np.testing.assert_array_equal(chosen(model, batch)(3), np.stack(hashes))


@pytest.mark.numerics
def test_random_experts_at_evaluation_are_drawn_by_layer_group_and_seed():
  # There are four rows of the same tokens, one group each, and two layers. Catches random numbers
  # that are the same in every layer, in every group or for another seed, and numbers that change
  # from call to call.
  changes = HASH | {"moe__router__name": "random_choice", "scan_layers": False}
  run = chosen(make(**changes), tuple(jnp.tile(part, (4, 1)) for part in packed([[8]])))
  first, other = np.asarray(run(0)).reshape(8, -1), np.asarray(run(1)).reshape(8, -1)
  assert len(np.unique(np.concatenate([first, other]), axis=0)) == 16
  np.testing.assert_array_equal(first, np.asarray(run(0)).reshape(8, -1))


class Probe(nn.Module):
  """An FFN that returns the constant 8 and reports its input."""

  @nn.compact
  def __call__(self, x, context, routing):
    return jnp.full_like(x, 8.0), Aux(metrics={"x": x[0, :, 0]})


class Dropped(nn.Module):
  """Four equal blocks with dropout, scanned."""

  @nn.compact
  def __call__(self, x):
    make = functools.partial(
      Block,
      attention=functools.partial(Add, 1.0, lambda _: None),
      ffn=Probe,
      norm=Same,
      dropout=0.5,
    )
    return run_layers(
      lambda *_: make, (True,) * 4, True, x, CONTEXT.replace(train=True), LayerRouting()
    )


def test_scanned_layers_draw_their_own_dropout():
  # From the input of one FFN to that of the next, the FFN adds 16 or 0 and the attention adds 2 or
  # 0, depending on their dropout masks. Catches one mask for all layers of a scan (split_rngs
  # without "dropout").
  _, aux = Dropped().apply({}, jnp.zeros((1, 32, 1)), rngs={"dropout": jax.random.key(0)})
  gained = np.diff(aux.metrics["x"], axis=0)
  assert gained.shape == (3, 32) and set(np.unique(gained)) == {0.0, 2.0, 16.0, 18.0}
  assert len(np.unique(gained, axis=0)) == len(np.unique(gained >= 16, axis=0)) == 3


@pytest.mark.numerics
def test_scanned_layers_draw_their_own_routing_noise():
  # Random experts in training depend on nothing but the key of each layer. Catches one key for all
  # layers of a scan (split_rngs without "router").
  model = make(moe__router__name="random_choice", moe__every=1, num_layers=4)
  batch = packed([[8]] * 4)
  keys = {"params": jax.random.key(0), "router": jax.random.key(1)}
  shapes = jax.eval_shape(lambda keys: model.init(keys, *batch, train=True), keys)
  # All four layers are scanned.
  assert set(shapes["params"]) == {"embedding", "repeats", "final_norm"}
  experts = tiny.quick_jit(
    lambda keys: tiny.at_first(model, keys, *batch, train=True, return_routing=True)[1].metrics[
      "top1_expert"
    ]
  )(keys)
  assert len(np.unique(np.asarray(experts).reshape(4, -1), axis=0)) == 4


# A layer of E = 4 experts with D = 16 and F = 24, to which 8 rows of 32 tokens send 2 * 256 rows.
ROWS, LENGTH, WIDTH, HIDDEN = 8, 32, 16, 24
SMALL = {
  "model.d_model": WIDTH,
  "model.num_layers": 1,
  "model.scan_layers": False,
  "model.moe.first": 0,
  "model.moe.num_experts": 4,
  "model.moe.d_ff": HIDDEN,
  "model.moe.router.name": "top_k",
  "model.moe.router.top_k.k": 2,
  "data.seq_len": LENGTH,
}


def backward_of(dispatcher, remat, mesh, capacity):
  """Returns (what the backward pass keeps, the jaxpr of the gradient) of a model of one layer."""
  c = config(
    SMALL
    | {"model.moe.dispatcher.name": dispatcher, "model.remat": remat}
    | {"model.moe.capacity_factor": capacity}
  )
  model = assembly.FAMILIES["decoder"](c.model, 264, "cpu")
  ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  variables = nn.unbox(assembly.abstract_variables(c, 264))

  def loss(params, ids):
    (nats, _), _ = model.apply({"params": params}, ids, ids, ids, train=False, targets=ids)
    return jnp.sum(nats)

  def backward(params, ids):
    return jax.vjp(lambda params: loss(params, ids), params)[1]

  with jax.set_mesh(sharding.make_mesh(mesh)):
    kept = jax.tree.leaves(jax.eval_shape(backward, variables["params"], ids))
    return kept, jax.make_jaxpr(jax.grad(loss))(variables["params"], ids)


@pytest.mark.parametrize("dispatcher", ["einsum", "scatter", "grouped"])
def test_policies_keep_what_they_name(dispatcher):
  # Catches a dispatcher that gives no name to what experts receive, compute or return, and arrays
  # that are kept twice.
  capacity = None if dispatcher == "grouped" else 2.0

  def kept(remat):
    leaves, _ = backward_of(dispatcher, remat, {"data": 1}, capacity)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

  sizes = {remat: kept(remat) for remat in ("full", "exchanges", "experts", "none")}
  # With a factor of 2 of S/E tokens there are twice as many slots as tokens. Without a capacity
  # there is one for each assignment, and spare ones for the last chunk.
  rows = 2 * ROWS * LENGTH
  received = rows * WIDTH
  if dispatcher == "grouped":
    # Rows are not received from other devices, but gathered again.
    rows, received = rows + layout(jnp.zeros(4, jnp.int32), rows).classes[-1], 0
  moved = 4 * (received + rows * WIDTH)
  assert sizes["exchanges"] - sizes["full"] == moved
  assert sizes["experts"] - sizes["full"] == moved + 4 * 2 * rows * HIDDEN
  assert sizes["none"] > sizes["experts"]


def count(jaxpr, primitive):
  """Returns how often a primitive occurs in a program, also inside calls."""
  found = 0
  for equation in jaxpr.eqns:
    found += equation.primitive.name == primitive
    found += sum(count(inner, primitive) for inner in jax.core.jaxprs_in_params(equation.params))
  return found


@pytest.mark.parametrize("dispatcher, capacity", [("all_to_all", 2.0), ("ragged_all_to_all", None)])
def test_rows_that_are_kept_are_not_sent_again(dispatcher, capacity):
  # Catches rows that cross the mesh once more in the backward pass, although they were kept, which
  # a policy cannot see in the body of a `jax.shard_map`.
  sent = {
    remat: count(backward_of(dispatcher, remat, {"expert": 4}, capacity)[1].jaxpr, "all_to_all")
    for remat in ("none", "exchanges", "experts", "full")
  }
  assert sent["none"] == sent["exchanges"] == sent["experts"] < sent["full"]
