"""Tests the LSTM language model with experts.

The tests check what it computes, what a position may see, and that options such as scanning and
rematerialisation change no value.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from configs import base
from moe_jax import accounts, assembly, sharding
from moe_jax.hlo import flops
from moe_jax.layers import Lstm

pytestmark = pytest.mark.numerics

V, L = 32, 8
HIERARCHICAL = {
  "moe__router__name": "hierarchical",
  "moe__router__hierarchical__groups": 2,
  "moe__router__hierarchical__k": 1,
}
LOSSES = {
  "balance_loss": 0.0,
  "z_loss": 0.0,
  "importance_loss": 0.1,
  "importance_of": "gates",
  "load_loss": 0.1,
}
SIZES = {
  "family": "lstm",
  "d_model": 16,
  "num_layers": 2,
  "activation": "relu",
  "tied_embeddings": False,
  "moe": {
    "first": 0,
    "num_experts": 4,
    "d_ff": 12,
    "dispatcher": {"name": "einsum"},
    "router": {"name": "noisy_top_k", "noisy_top_k": {"k": 2}},
  }
  | LOSSES,
}


def packed(rows):
  """Returns tokens, segment_ids and positions of rows, for the lengths of each row's documents.

  The rest of a row is padding.
  """
  tokens = np.stack([np.random.default_rng(i).permutation(V)[:L] for i in range(len(rows))])
  segments, positions = np.zeros((2, len(rows), L), np.int32)
  for r, lengths in enumerate(rows):
    segments[r, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions[r, : sum(lengths)] = np.concatenate([np.arange(n) for n in lengths])
  return tuple(jnp.asarray(a, jnp.int32) for a in (tokens, segments, positions))


def settings(**changes):
  """Returns the config of a model of a few thousand weights.

  Changes are keys of config.model, with `__` instead of the dot.
  """
  c = base.get_config()
  c.model.update(SIZES)
  c.model.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in changes.items()}
  )
  return c


def make(**changes):
  return assembly.model(settings(**changes), V, sharding.make_mesh({"data": 1}))


def initialise(model, batch):
  """Returns variables with large router weights, so that the router prefers some experts."""
  return jax.tree_util.tree_map_with_path(
    lambda path, w: 4 * w if "router" in path[-1].key else w, tiny.weights(model, *batch)
  )


def run(model, variables, batch, return_routing=False):
  return tiny.applied(model, train=False, return_routing=return_routing)(variables, batch, {})


def test_the_papers_layers_by_hand():
  # By appendix C.1, the model computes x = e, x += lstm(x), x += sigmoid(sum of gate * expert(x)),
  # x += lstm(x) and logits = x W. Catches a missing sigmoid or one before the gates, a norm,
  # experts after the second LSTM, and a missing residual.
  model, batch = make(scan_layers=False), packed([[3, 5], [6]])
  variables = initialise(model, batch)
  p, (tokens, _, positions) = variables["params"], batch
  assert set(p) == {"embedding", "head", "layer_0", "layer_1"} and set(p["layer_1"]) == {"lstm"}

  def lstm(i, x):
    return Lstm(16).apply({"params": p[f"layer_{i}"]["lstm"]}, x, positions)

  x = 4 * p["embedding"][tokens]  # sqrt(D)
  x += lstm(0, x)
  moe = p["layer_0"]["moe"]
  logits = x @ moe["router"]
  kept = jnp.where(logits >= jnp.sort(logits, axis=-1)[..., -2:-1], logits, -jnp.inf)
  made = jnp.einsum(
    "blef,efd->bled", jax.nn.relu(jnp.einsum("bld,edf->blef", x, moe["up"])), moe["down"]
  )
  x += jax.nn.sigmoid(jnp.einsum("ble,bled->bld", jax.nn.softmax(kept, axis=-1), made))
  x += lstm(1, x)
  ours, aux = run(model, variables, batch)
  real = batch[1] > 0
  np.testing.assert_allclose(ours[real], (x @ p["head"])[real], atol=1e-4)
  assert set(aux.losses) == {"importance", "load"} and aux.metrics["load"].shape == (1, 4)


@pytest.mark.parametrize("changes", [{}, HIERARCHICAL], ids=["flat", "hierarchical"])
def test_what_a_position_sees(changes):
  # The tokens of the row are distinct, so the gradient with respect to a token's embedding says
  # whether a position sees it. Catches a state or experts' slots that cross a document's end, and
  # positions that see later tokens.
  model = make(**changes)
  batch = tokens, segments, _ = packed([[3, 5]])
  variables = initialise(model, batch)

  def gradients(embedding):
    variables["params"]["embedding"] = embedding
    logits, _ = model.apply(variables, *batch, train=False)
    return jnp.sum(jnp.sin(logits[0]), axis=-1)  # [L]

  by_token = tiny.quick_jit(jax.jacrev(gradients))(variables["params"]["embedding"])[
    :, tokens[0]
  ]  # [L, L, D]
  sees = np.asarray(jnp.abs(by_token).max(axis=-1) > 1e-7)
  np.testing.assert_array_equal(sees, np.tril(np.asarray(segments[0][:, None] == segments[0])))


def test_padding_changes_nothing():
  # All tokens of a batch are one group. Catches padding in losses or metrics.
  batch = packed([[3, 4], [6]])
  more = tuple(jnp.concatenate([a, jnp.zeros((2, L), jnp.int32)]) for a in batch)
  small, large = make(moe__group_size=2 * L), make(moe__group_size=4 * L)
  variables = initialise(small, batch)
  logits, aux = run(small, variables, batch)
  logits2, aux2 = run(large, variables, more)
  np.testing.assert_allclose(logits2[:2], logits, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aux, aux2)


@pytest.mark.every_variant
def test_scanned_layers_equal_unrolled_layers():
  # Four layers with experts after layers 0 and 2 give two repetitions. Catches parameters that
  # repetitions share.
  scanned, unrolled = (make(num_layers=4, scan_layers=scan) for scan in (True, False))
  batch = packed([[3, 5], [8]])
  variables = initialise(scanned, batch)
  params = dict(variables["params"])
  repeats = params.pop("repeats")
  params |= {
    f"layer_{i}": jax.tree.map(operator.itemgetter(i // 2), repeats[f"layer_{i % 2}"])
    for i in range(4)
  }
  logits, aux = run(scanned, variables, batch, return_routing=True)
  logits2, aux2 = run(unrolled, {"params": params}, batch, return_routing=True)
  np.testing.assert_allclose(logits, logits2, atol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aux, aux2)
  assert aux.metrics["top1_expert"].shape == (2, 2, L)


def _loss(params, *batch, model):
  keys = {"dropout": jax.random.key(1), "router": jax.random.key(2)}
  logits, aux = model.apply({"params": params}, *batch, train=True, rngs=keys)
  return jnp.mean(jnp.square(logits) * (batch[1] > 0)[..., None]) + sum(aux.losses.values()), aux


def _rematerialised():
  """Returns (batch, [model without rematerialisation, model with it], variables)."""
  batch = packed([[8]])
  models = [make(remat=remat, dropout=0.3) for remat in ("none", "full")]
  return batch, models, initialise(models[0], batch)


@pytest.mark.every_variant
def test_rematerialisation_changes_no_value():
  # Catches dropout or noise that is drawn anew in the backward pass.
  batch, models, variables = _rematerialised()
  first, second = [
    tiny.quick_jit(jax.value_and_grad(functools.partial(_loss, model=model), has_aux=True))(
      variables["params"], *batch
    )
    for model in models
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, second)


def test_layers_are_rematerialised():
  # Catches an option that is not read.
  batch, models, variables = _rematerialised()
  programs = [
    str(jax.make_jaxpr(functools.partial(m.apply, train=False))(variables, *batch)) for m in models
  ]
  assert ["remat" in program for program in programs] == [False, True]


def test_dropout_is_on_every_layers_output():
  # Dropout follows the embedding, two LSTMs and the experts. Catches a missing dropout, and dropout
  # at evaluation.
  model, batch = make(dropout=0.5), packed([[8]])
  variables = initialise(model, batch)

  def num_dropouts(train):
    return str(
      jax.make_jaxpr(
        functools.partial(
          model.apply, train=train, rngs={"dropout": jax.random.key(0), "router": jax.random.key(0)}
        )
      )(variables, *batch)
    ).count("name=_bernoulli")

  assert (num_dropouts(True), num_dropouts(False)) == (4, 0)


@pytest.mark.every_variant
def test_a_mesh_computes_the_same():
  # The model has a projected LSTM, one group for the whole batch and a hierarchical gate. Catches a
  # parameter without logical axes, units that are summed over copies, and a group that lies on
  # several devices and is balanced on each of them.
  batch = packed([[3, 5], [8], [4], [2, 2, 2], [8], [1, 7], [5], [6]])
  model = make(**HIERARCHICAL, moe__group_size=8 * L, lstm_units=24)
  variables = initialise(model, batch)
  step = jax.value_and_grad(functools.partial(_loss, model=model), has_aux=True)
  expected = tiny.quick_jit(step)(variables["params"], *batch)
  boxed = jax.eval_shape(lambda key: model.init(key, *batch, train=False), jax.random.key(0))
  assert all(
    isinstance(leaf, nn.LogicallyPartitioned)
    for leaf in jax.tree.leaves(
      boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
  )
  mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
  placed, rows = sharding.param_shardings(mesh, boxed)["params"], sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    value = tiny.quick_jit(step, in_shardings=(placed, rows, rows, rows))(
      jax.device_put(variables["params"], placed), *jax.device_put(batch, rows)
    )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), expected, value)


def test_flops_and_operations_by_hand():
  # Catches time steps that are missing in the count, attention that is counted, and a projection
  # that is left out. The FLOPs contain the gates of all groups, the operations only those of the
  # chosen groups.
  d, u, e = 16, 24, 4
  lstm = 2 * (8 * d * u + u * d)
  dense = settings(moe__num_experts=0, lstm_units=u)
  model, batch = assembly.model(dense, V, sharding.make_mesh({"data": 1})), packed([[8]])
  variables = nn.unbox(
    jax.eval_shape(lambda key: model.init(key, *batch, train=False), jax.random.key(0))
  )
  of_program = flops.matmul_flops(lambda v: model.apply(v, *batch, train=False)[0], variables)
  assert of_program / L == accounts.flops_per_token(dense, V) == 2 * (lstm + d * V)
  assert accounts.operations_per_step(dense, V) == lstm
  for primary_k, k in ((2, 1), (1, 2)):
    c = settings(lstm_units=u, **HIERARCHICAL)
    c.model.moe.router.hierarchical.update({"primary_k": primary_k, "k": k})
    groups, members, experts = 2 * d * 2, 2 * d * e, 2 * 2 * d * 12  # logits and noise
    assert accounts.flops_per_token(c, V) == 2 * (lstm + experts + groups + members + d * V)
    assert accounts.operations_per_step(c, V) == lstm + experts + groups + members * primary_k / 2
