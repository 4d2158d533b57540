"""Tests the language model as a decoder-only Transformer.

The tests check what a position may see, and that options such as scanning change speed and not
values.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoder_inputs import L, V, initialise, make, packed, run
from flax import linen as nn

from moe_jax.layers import Aux

pytestmark = pytest.mark.numerics

RELATIVE = {"position": "relative", "relative_buckets": 4, "relative_max_distance": 6}
LATENT = {
  "attention": "latent",
  "latent": {"kv_rank": 6, "query_rank": 5, "nope_dim": 4, "rope_dim": 2, "value_dim": 3},
}


@pytest.mark.parametrize(
  "window, changes",
  [
    (L, {"moe__num_shared_experts": 1}),
    (L, RELATIVE | {"moe__extra_ffn": True}),
    (L, LATENT),
    (3, RELATIVE | {"sliding_window": 3}),
  ],
  ids=["rope", "relative", "latent", "window"],
)
def test_what_a_position_sees(window, changes):
  # The tokens of the row are distinct and the embedding is untied, so the gradient with respect to
  # a token's embedding says whether a position sees it. Catches a mask that is off by one,
  # attention or expert slots across documents, and positions that see later tokens.
  model = make(tied_embeddings=False, **changes)
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
  same = np.asarray(segments[0][:, None] == segments[0])
  np.testing.assert_array_equal(sees, np.tril(same) & ~np.tril(np.ones((L, L), bool), -window))


@pytest.mark.parametrize(
  "changes",
  [{}, pytest.param(RELATIVE, marks=pytest.mark.every_variant), LATENT],
  ids=["rope", "relative", "latent"],
)
def test_packed_documents_are_as_if_alone(changes):
  # Catches positions that do not restart, and documents that change each other's output. No token
  # is dropped here.
  model = make(**changes)
  tokens, segments, positions = batch = packed([[3, 4]])
  variables = initialise(model, batch)
  logits, _ = run(model, variables, batch)
  alone = jnp.zeros((2, L), jnp.int32).at[0, :3].set(tokens[0, :3]).at[1, :4].set(tokens[0, 3:7])
  _, *places = packed([[3], [4]])
  separate, _ = run(model, variables, (alone, *places))
  np.testing.assert_allclose(logits[0, :3], separate[0, :3], atol=1e-5)
  np.testing.assert_allclose(logits[0, 3:7], separate[1, :4], atol=1e-5)


def test_padding_changes_nothing():
  # Catches padding rows in the losses and metrics of the whole model.
  model = make(moe__capacity_factor=1.0)
  batch = packed([[3, 4], [6]])
  variables = initialise(model, batch)
  logits, aux = run(model, variables, batch)
  more = tuple(jnp.concatenate([a, jnp.zeros((2, L), jnp.int32)]) for a in batch)
  logits2, aux2 = run(model, variables, more)
  np.testing.assert_allclose(logits2[:2], logits, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aux, aux2)


@pytest.mark.parametrize(
  "changes",
  [
    pytest.param({}, marks=pytest.mark.every_variant),
    RELATIVE | {"moe__extra_ffn": True, "ffn_bias": "multiplicative"},
  ],
  ids=["plain", "st_moe"],
)
def test_scanned_layers_equal_unrolled_layers(changes):
  # The 5 layers are D M D M D, of which the first four are two repetitions. Catches a bias row or a
  # metric of the wrong layer, parameters that repetitions share, and a remainder that is applied
  # first.
  changes = changes | dict(
    num_layers=5, moe__first=1, moe__balancing__rule="sign", moe__balancing__rate=0.1
  )
  scanned, unrolled = make(**changes), make(**changes, scan_layers=False)
  batch = packed([[3, 5], [8]])
  variables = initialise(scanned, batch)
  variables["router_state"] = {"bias": jnp.asarray([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])}
  params = dict(variables["params"])
  repeats = params.pop("repeats")
  for i in range(4):
    params[f"layer_{i}"] = jax.tree.map(operator.itemgetter(i // 2), repeats[f"layer_{i % 2}"])
  assert jax.tree.structure(params) == jax.tree.structure(initialise(unrolled, batch)["params"])
  assert not np.array_equal(repeats["layer_0"]["ffn"]["up"][0], repeats["layer_0"]["ffn"]["up"][1])
  logits, aux = run(scanned, variables, batch, return_routing=True)
  logits2, aux2 = run(unrolled, variables | {"params": params}, batch, return_routing=True)
  np.testing.assert_allclose(logits, logits2, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aux, aux2)
  assert aux.metrics["load"].shape == (2, 4) and aux.metrics["top1_expert"].shape == (2, 2, L)
  # With K = 2, the expert that the bias prefers gets half of the assignments, one per token.
  assert aux.metrics["load"][0, 1] == 0.5 and aux.metrics["load"][1, 3] == 0.5


def test_global_layers_see_further_and_no_positions():
  # With a window of 2, a change of the first token reaches place i after i layers. The second of
  # four layers is global, so that it reaches all places by then; of two layers without a global
  # one it reaches only two. Without positions, a global layer alone cannot tell the order of the
  # tokens before. Catches a window in global layers, none in others, and positions that stay.
  def reached(**changes):
    model = make(sliding_window=2, moe__num_experts=0, **changes)
    tokens, *rest = batch = packed([[8]])
    variables = initialise(model, batch)
    logits = run(model, variables, batch)[0]
    moved = run(model, variables, (tokens.at[0, 0].add(1) % V, *rest))[0]
    return list(np.flatnonzero(np.any(logits != moved, axis=-1)[0]))

  assert reached(num_layers=2) == [0, 1, 2]
  assert reached(num_layers=2, global_every=2) == list(range(L))
  assert reached(num_layers=4, global_every=3) == list(range(L))

  def last(order, **changes):
    model = make(num_layers=1, moe__num_experts=0, global_every=1, **changes)
    tokens, *rest = batch = packed([[8]])
    return run(model, initialise(model, batch), (tokens[:, order], *rest))[0][0, -1]

  swapped = np.asarray([1, 0, *range(2, L)])
  np.testing.assert_allclose(
    last(swapped, global_positions=False), last(np.arange(L), global_positions=False), atol=1e-5
  )
  assert not np.allclose(last(swapped), last(np.arange(L)), atol=1e-3)


def test_the_first_layers_take_experts_by_hash():
  # Of five layers with experts, the first two route by ids: two tokens of one id share their
  # experts whatever precedes them, also after a change of the router. The scan has other kinds of
  # layers beside it. Catches layers of the wrong kind, one hash for all layers, and gates that are
  # not learned.
  changes = {
    "num_layers": 5,
    "moe__first": 0,
    "moe__every": 1,
    "moe__hash_layers": 2,
    "moe__router__name": "scored_top_k",
    "moe__router__scored_top_k__gate_norm": "none",
    "moe__balancing__rule": "sign",
    "moe__balancing__rate": 0.1,
  }
  model = make(**changes)
  assert model.kinds == ("hash", "hash", True, True, True)
  tokens, *rest = packed([[8]])
  tokens = jnp.asarray([[5, 9, 5, 1, 9, 5, 2, 3]])
  variables = initialise(model, (tokens, *rest))
  assert set(variables["params"]) >= {"repeats"}

  def experts(params):
    _, aux = run(model, variables | {"params": params}, (tokens, *rest), return_routing=True)
    plan = aux.metrics["plan"]
    return np.asarray(plan.expert)[:, 0].reshape(5, 2, L), np.asarray(plan.gate)[:, 0]

  chosen, gates = experts(variables["params"])
  flipped = jax.tree_util.tree_map_with_path(
    lambda path, w: -w if path[-1].key == "router" else w, variables["params"]
  )
  others, other_gates = experts(flipped)
  for layer in range(2):
    assert np.all(chosen[layer, :, 0] == chosen[layer, :, 2])
    assert np.all(chosen[layer, :, 1] == chosen[layer, :, 4])
    np.testing.assert_array_equal(others[layer], chosen[layer])
    assert not np.allclose(gates[layer], other_gates[layer])
  assert np.any(chosen[0] != chosen[1]) and np.any(others[2] != chosen[2])
  unrolled = make(**changes, scan_layers=False)
  assert "layer_4" in initialise(unrolled, (tokens, *rest))["params"]


@pytest.mark.parametrize("scan_layers", [True, False])
def test_routers_read_the_logits_of_the_layer_before(scan_layers):
  # Of six layers, 1, 3 and 5 have experts. Without the matrix of the last one, its logits lack
  # those of the layer before times this matrix; they are compared up to a constant of each token.
  # Catches logits that dense layers or repetitions lose, those of another layer, and a matrix that
  # is transposed.
  changes = {"num_layers": 6, "moe__first": 1, "moe__gate_residual": True}
  model = make(**changes, scan_layers=scan_layers)
  batch = packed([[8]])
  variables = initialise(model, batch)

  def log_probabilities(params):
    _, aux = run(model, variables | {"params": params}, batch, return_routing=True)
    return np.log(aux.metrics["probabilities"])

  def without_the_last(path, leaf):
    if path[-1].key != "router_residual":
      return leaf
    if scan_layers:
      return leaf.at[-1].set(0)
    return jnp.zeros_like(leaf) if path[0].key == "layer_5" else leaf

  params = variables["params"]
  full = log_probabilities(params)
  less = log_probabilities(jax.tree_util.tree_map_with_path(without_the_last, params))
  np.testing.assert_allclose(less[:2], full[:2], atol=1e-6)
  place = params["repeats"]["layer_1"] if scan_layers else params["layer_5"]
  matrix = place["ffn"]["router_residual"]
  added = full[1] @ (matrix[-1] if scan_layers else matrix)
  centred = [each - each.mean(axis=-1, keepdims=True) for each in (full[2] - less[2], added)]
  # A constant c of the logits before adds c times the sums of the matrix's columns.
  columns = np.asarray((matrix[-1] if scan_layers else matrix).sum(axis=0))
  columns = columns - columns.mean()
  rest = centred[0] - centred[1]
  rest -= (rest @ columns / (columns @ columns))[..., None] * columns
  np.testing.assert_allclose(rest, 0, atol=1e-4)
  assert np.abs(centred[0]).max() > 0.01


def test_a_stored_plan_is_followed_by_every_layer():
  # Routers with other weights choose other experts, but with the stored plans of the first run they
  # give the same plans in every layer, scanned or not. Catches a layer that gets the plan of
  # another layer, and a plan that is not passed into the scan.
  model = make(num_layers=5, moe__first=1)
  batch = packed([[3, 5], [8]])
  variables = initialise(model, batch)
  _, aux = run(model, variables, batch, return_routing=True)
  plan = aux.metrics["plan"]
  assert plan.token.shape[0] == 2 and plan.num_experts == 4
  flipped = jax.tree_util.tree_map_with_path(
    lambda path, w: -5 * w if path[-1].key == "router" else w, variables["params"]
  )
  _, other = run(model, {"params": flipped}, batch, return_routing=True)
  assert np.any(other.metrics["plan"].expert != plan.expert)
  _, replayed = run(model, {"params": flipped}, batch, return_routing=True, stored=plan)
  jax.tree.map(np.testing.assert_array_equal, replayed.metrics["plan"], plan)


def _gradients(model, variables, batch):
  def loss(params):
    logits, aux = model.apply(
      {"params": params},
      *batch,
      train=True,
      rngs={"dropout": jax.random.key(1), "router": jax.random.key(2)},
    )
    return jnp.mean(jnp.square(logits)) + aux.losses["balance"]

  return tiny.quick_jit(jax.value_and_grad(loss))(variables["params"])


@pytest.mark.parametrize(
  "remat", tiny.often({"full", "experts"}, ["full", "dots", "exchanges", "experts"])
)
def test_rematerialisation_changes_no_value(remat):
  # Catches dropout or jitter that is drawn anew in the backward pass.
  batch = packed([[8]])
  models = [make(remat=remat, dropout=0.3, moe__jitter=0.1) for remat in ("none", remat)]
  variables = initialise(models[0], batch)
  first, other = (_gradients(model, variables, batch) for model in models)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, other)
  programs = [
    str(jax.make_jaxpr(functools.partial(m.apply, train=False))(variables, *batch)) for m in models
  ]
  assert ["remat" in program for program in programs] == [False, True]


def test_dropout_only_in_training():
  # Catches dropout at evaluation, and a mask that does not depend on the key.
  model = make(dropout=0.5, moe__num_experts=0)
  batch = packed([[8]])
  variables = initialise(model, batch)
  train = tiny.quick_jit(
    lambda key: model.apply(variables, *batch, train=True, rngs={"dropout": key})[0]
  )
  assert not np.allclose(train(jax.random.key(0)), train(jax.random.key(1)))
  np.testing.assert_allclose(
    run(model, variables, batch)[0], run(make(moe__num_experts=0), variables, batch)[0]
  )


def test_bfloat16_activations_over_float32_weights():
  # Catches logits in bfloat16, weights in bfloat16, and a residual stream that silently becomes
  # float32.
  model = make(dtype="bfloat16")
  batch = packed([[8]])
  variables = initialise(model, batch)
  value, gradient = _gradients(model, variables, batch)
  assert all(
    leaf.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(leaf)))
    for leaf in jax.tree.leaves(gradient)
  )
  assert (
    bool(jnp.isfinite(value)) and float(jnp.abs(gradient["layer_0"]["ffn"]["router"]).max()) > 0
  )
  logits, _ = jax.eval_shape(lambda v: model.apply(v, *batch, train=False), variables)
  assert logits.dtype == jnp.float32
  jaxpr = str(jax.make_jaxpr(lambda v: model.apply(v, *batch, train=False))(variables))
  assert ":bf16[1,8,16] = add" in jaxpr and ":f32[1,8,16] = add" not in jaxpr


def test_a_dense_model_reports_nothing():
  # Catches losses of experts that do not exist.
  model = make(moe__num_experts=0)
  aux = jax.eval_shape(
    lambda key: tiny.at_first(model, key, *packed([[8]]), train=True), jax.random.key(0)
  )[1]
  assert aux == Aux()


def test_layers_reduce_by_mean_or_sum():
  # Catches a coefficient whose effect is num_layers times as large as it should be.
  batch = packed([[8]])
  mean, total = (make(num_layers=2, moe__every=1, moe__layer_reduce=how) for how in ("mean", "sum"))
  variables = initialise(mean, batch)
  losses, losses2 = (run(model, variables, batch)[1].losses for model in (mean, total))
  assert float(losses2["z"]) == pytest.approx(2 * float(losses["z"]), rel=1e-5)


def test_an_extra_ffn_comes_right_before_the_experts():
  # The layer must compute x + extra(norm(x)) and then x + experts(norm(x)), which is compared with
  # models that have only one of the two. Catches an extra FFN in layers without experts, after the
  # experts or parallel to them, and a norm or a residual that it shares with them.
  changes = dict(
    num_layers=2, moe__first=1, moe__extra_ffn=True, moe__activation="relu", scan_layers=False
  )
  model, batch = make(**changes), packed([[3, 5]])
  params = initialise(model, batch)["params"]
  assert "extra" not in params["layer_0"] and set(params["layer_1"]["extra"]) == {
    "up",
    "gate",
    "down",
  }
  # The experts are not gated, but the dense FFNs are.
  assert set(params["layer_1"]["ffn"]) == {"router", "up", "down"}
  silent = jax.tree.map(lambda leaf: leaf, params)
  silent["layer_1"] = params["layer_1"] | {
    "ffn": params["layer_1"]["ffn"] | {"down": jnp.zeros_like(params["layer_1"]["ffn"]["down"])}
  }
  # If the experts add nothing, the layer equals that of a dense model whose FFN is the extra one.
  dense = make(num_layers=2, moe__num_experts=0, scan_layers=False)
  layer = {
    "ffn": params["layer_1"]["extra"],
    "ffn_norm": params["layer_1"]["extra_norm"],
    **{name: params["layer_1"][name] for name in ("attention", "attention_norm")},
  }
  logits, _ = run(model, {"params": silent}, batch)
  np.testing.assert_allclose(
    logits, run(dense, {"params": params | {"layer_1": layer}}, batch)[0], atol=1e-5
  )
  # If the extra FFN adds nothing, the layer equals one without it.
  extra = params["layer_1"]["extra"] | {"down": jnp.zeros_like(params["layer_1"]["extra"]["down"])}
  logits, _ = run(
    model, {"params": params | {"layer_1": params["layer_1"] | {"extra": extra}}}, batch
  )
  without = {name: leaf for name, leaf in params["layer_1"].items() if not name.startswith("extra")}
  expected, _ = run(
    make(**changes | {"moe__extra_ffn": False}), {"params": params | {"layer_1": without}}, batch
  )
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_the_decoder_shares_a_table_of_relative_biases():
  # Catches a table per layer, and a table that the layers outside the scan do not read.
  batch = packed([[3, 5]])
  for scan in (True, False):
    model = make(num_layers=3, moe__first=1, scan_layers=scan, relative_shared=True, **RELATIVE)
    params = initialise(model, batch)["params"]
    tables = [
      path
      for path, _ in jax.tree_util.tree_leaves_with_path(params)
      if path[-1].key == "relative_bias"
    ]
    assert [len(path) for path in tables] == [1] and params["relative_bias"].shape == (2, 4)
    later = params | {
      "relative_bias": params["relative_bias"] + jnp.asarray([[3.0, 0, 0, 0], [0, 0, 3.0, 0]])
    }
    assert not np.allclose(
      run(model, {"params": later}, batch)[0], run(model, {"params": params}, batch)[0]
    )


@pytest.mark.parametrize(
  "changes",
  [{"qk_norm": True}, {"norm": "layernorm"}, {"norm": "rmsnorm_unscaled"}, LATENT],
  ids=["qk_norm", "layernorm", "unscaled", "latent"],
)
def test_every_norm_has_the_models_epsilon_but_those_of_latents(changes):
  # Catches a norm of a block, of an extra FFN, of queries and keys or at the end that keeps the
  # default epsilon, and a norm of a latent that does not keep it.
  batch = packed([[8]])
  model = make(norm_eps=0.05, moe__extra_ffn=True, **changes)
  variables, epsilons = initialise(model, batch), {}

  def record(call, args, kwargs, context):
    if context.method_name == "__call__" and hasattr(context.module, "epsilon"):
      epsilons[context.module.name] = context.module.epsilon
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    jax.eval_shape(lambda v: model.apply(v, *batch, train=False), variables)
  latents = {"latent_norm", "query_latent_norm"} if "attention" in changes else set()
  named = {"query_norm", "key_norm"} if "qk_norm" in changes else latents
  assert set(epsilons) == named | {"attention_norm", "extra_norm", "ffn_norm", "final_norm"}
  assert {name: epsilon for name, epsilon in epsilons.items() if epsilon != 0.05} == dict.fromkeys(
    latents, 1e-6
  )


def test_embed_scale():
  # Catches a flag that is not read, and a flag that changes the initial weights instead of the
  # factor on the embedding's rows.
  batch = packed([[8]])
  models = [
    make(moe__num_experts=0, tied_embeddings=False, embed_scale=scale) for scale in (True, False)
  ]
  variables = initialise(models[0], batch)
  first, other = (tiny.first_embedding(model, *batch) for model in models)
  np.testing.assert_array_equal(first, other)
  # The factor 4 is sqrt(d_model).
  larger = variables["params"] | {"embedding": 4.0 * variables["params"]["embedding"]}
  np.testing.assert_allclose(
    run(models[1], {"params": larger}, batch)[0], run(models[0], variables, batch)[0], atol=1e-5
  )


@pytest.mark.parametrize("tied", [True, False])
def test_logits_begin_with_unit_variance(tied):
  # Catches an embedding that is off by a factor of sqrt(D). The tied logit of the token just read
  # is near sqrt(D) and is checked separately.
  model = make(d_model=64, head_dim=16, tied_embeddings=tied, moe__num_experts=0)
  tokens, _, _ = batch = packed([[8]] * 8)
  logits, _ = tiny.quick_jit(lambda key: tiny.at_first(model, key, *batch, train=False))(
    jax.random.key(0)
  )
  own = jax.nn.one_hot(tokens, V, dtype=bool)
  assert 0.7 < float(jnp.std(logits[~own])) < 1.4
  assert float(jnp.mean(logits[own])) == pytest.approx(6.5 if tied else 0.0, abs=2.0)
