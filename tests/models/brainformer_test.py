"""Tests the Brainformer, whose blocks are lists of the sublayers of the decoder."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoder_inputs import L, V, initialise, make, packed, run
from flax import linen as nn

from moe_jax import sharding
from moe_jax.models import SEARCH_SPACE

pytestmark = pytest.mark.numerics

MIXED = (
  "attention:width=12,heads=3",
  "moe:gate=top_2,capacity=1,activation=reglu",
  "ffn:width=20,hidden=8",
  "attention",
  "moe:width=12,gate=top_2,hidden=8,capacity=4",
)
CHOSEN = ("attention", "moe:gate=expert_choice,capacity=1")


def brainformer(block, **changes):
  # With a smaller capacity, whether a second choice finds a slot would depend on later tokens.
  # These factors give every assignment a slot.
  return make(
    **{
      "family": "brainformer",
      "block": block,
      "moe__capacity_factor": 4.0,
      "moe__eval_capacity_factor": 4.0,
    }
    | changes
  )


def test_the_search_space():
  # Catches an option or a value that the paper's Table 1 does not have.
  assert {kind: set(options) for kind, options in SEARCH_SPACE.items()} == {
    "attention": {"width", "heads"},
    "ffn": {"width", "hidden", "activation"},
    "moe": {"width", "hidden", "activation", "gate", "capacity"},
  }
  assert SEARCH_SPACE["ffn"]["hidden"] == (1536, 2048, 3072, 4096)


def test_a_block_of_the_decoders_sublayers_is_the_decoder():
  # Catches sublayers in another order, a norm, residual or initial scale that differs from the
  # decoder's, and a block that is stacked only once.
  decoder = make(num_layers=4, moe__first=1)
  block = brainformer(
    ("attention", "ffn", "attention", "moe"),
    num_layers=2,
    moe__capacity_factor=None,
    moe__eval_capacity_factor=None,
  )
  batch = packed([[3, 5], [6]])
  variables = initialise(block, batch)
  params = dict(variables["params"])
  repeats = params.pop("repeats")
  params["repeats"] = {
    f"layer_{i}": repeats[f"layer_{2 * i}"] | repeats[f"layer_{2 * i + 1}"] for i in range(2)
  }
  theirs = initialise(decoder, batch)["params"]
  assert jax.tree.structure(params) == jax.tree.structure(theirs)

  def spread(tree):
    return np.std(tree["repeats"]["layer_1"]["ffn"]["down"])

  np.testing.assert_allclose(spread(params), spread(theirs), rtol=0.1)
  logits, aux = run(block, variables, batch)
  logits2, aux2 = run(decoder, {"params": params}, batch)
  np.testing.assert_allclose(logits, logits2, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aux, aux2)


@pytest.mark.parametrize(
  "block, ahead", [(MIXED, False), (CHOSEN, True)], ids=["top_2", "expert_choice"]
)
def test_what_a_position_sees(block, ahead):
  # As for the decoder, the tokens of the row are distinct, so the gradients with respect to their
  # embeddings say what a position sees. Expert choice has no gradient from later tokens, but a
  # change of the last token changes earlier outputs. Catches a sublayer that mixes positions, and a
  # leak that is not declared.
  model = brainformer(block, tied_embeddings=False, moe__allow_noncausal_routing=ahead)
  batch = tokens, segments, _ = packed([[3, 5]])
  variables = initialise(model, batch)

  def by_embedding(embedding):
    variables["params"]["embedding"] = embedding
    return jnp.sum(jnp.sin(model.apply(variables, *batch, train=False)[0][0]), axis=-1)

  jacobian = tiny.quick_jit(jax.jacrev(by_embedding))(variables["params"]["embedding"])[
    :, tokens[0]
  ]
  sees = np.asarray(jnp.abs(jacobian).max(axis=-1) > 1e-7)
  same = np.asarray(segments[0][:, None] == segments[0])
  assert not np.any(sees & ~np.tril(same)) and (ahead or np.array_equal(sees, np.tril(same)))
  # These rows will differ only in their last token.
  rows = [jnp.repeat(a, V, axis=0) for a in batch]
  logits = run(model, initialise(model, batch), (rows[0].at[:, -1].set(jnp.arange(V)), *rows[1:]))[
    0
  ][:, :-1]
  assert (float(jnp.abs(logits - logits[:1]).max()) > 1e-4) == ahead


def test_padding_changes_nothing():
  # Catches padding in slots, losses or metrics of a sublayer.
  model = brainformer(MIXED)
  batch = packed([[3, 4], [6]])
  variables = initialise(model, batch)
  logits, aux = run(model, variables, batch)
  more = tuple(jnp.concatenate([a, jnp.zeros((2, L), jnp.int32)]) for a in batch)
  logits2, aux2 = run(model, variables, more)
  np.testing.assert_allclose(logits2[:2], logits, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aux, aux2)


@pytest.mark.every_variant
def test_scanned_blocks_equal_unrolled_ones():
  # There are two gates, so that plans of 16 and of 8 assignments must be stacked. Catches sublayers
  # of one kind that share parameters, a metric of the wrong sublayer, and a padded plan whose added
  # assignments name an expert.
  block, n = (*MIXED[1:3], "attention:width=12,heads=3", "moe:gate=expert_choice,capacity=1"), 4
  changes = {"num_layers": 2, "moe__allow_noncausal_routing": True}
  scanned, unrolled = (
    brainformer(block, **changes),
    brainformer(block, **changes, scan_layers=False),
  )
  batch = packed([[3, 5], [8]])
  variables = initialise(scanned, batch)
  params = dict(variables["params"])
  repeats = params.pop("repeats")
  for i in range(2 * n):
    params[f"layer_{i}"] = jax.tree.map(operator.itemgetter(i // n), repeats[f"layer_{i % n}"])
  assert jax.tree.structure(params) == jax.tree.structure(initialise(unrolled, batch)["params"])
  logits, aux = run(scanned, variables, batch, return_routing=True)
  logits2, aux2 = run(unrolled, {"params": params}, batch, return_routing=True)
  np.testing.assert_allclose(logits, logits2, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aux, aux2)
  plan = aux.metrics["plan"]
  assert plan.expert.shape == (4, 2, 16) and aux.metrics["load"].shape == (4, 4)
  assert np.all(np.asarray(plan.expert[1, :, 8:]) == 4) and not np.any(plan.gate[1, :, 8:])
  replayed, _ = run(scanned, variables, batch, stored=plan)
  np.testing.assert_allclose(replayed, logits, atol=1e-5)


@pytest.mark.every_variant
def test_a_mesh_computes_the_same():
  # Catches a logical axis that splits what must not be split, such as a sublayer's own width.
  model = brainformer(
    ("attention:width=8,heads=4", "moe:gate=top_2,hidden=8", "ffn:width=24"),
    num_heads=4,
    num_kv_heads=4,
  )
  batch = packed([[3, 5], [8], [4, 4], [2, 6], [7], [1, 7], [5], [8]])
  variables = initialise(model, batch)

  def loss(params, batch):
    logits, aux = model.apply({"params": params}, *batch, train=False)
    return jnp.mean(jnp.square(logits) * (batch[1] > 0)[..., None]) + sum(aux.losses.values())

  step = jax.value_and_grad(loss)
  expected = tiny.quick_jit(step)(variables["params"], batch)
  boxed = jax.eval_shape(lambda key: model.init(key, *batch, train=False), jax.random.key(0))
  mesh = sharding.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
  placed = sharding.param_shardings(mesh, boxed)["params"]
  with jax.set_mesh(mesh):
    rows = sharding.batch_sharding(mesh)
    value = tiny.quick_jit(step, in_shardings=(placed, rows))(
      jax.device_put(variables["params"], placed), jax.device_put(batch, rows)
    )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expected, value)
  assert nn.unbox(boxed)["params"]["layer_0"]["to_width"].shape == (16, 8)
