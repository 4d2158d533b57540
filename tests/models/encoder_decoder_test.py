"""Tests the encoder-decoder.

The tests check what a position may see, that options such as scanning change speed and not values,
and the number of parameters.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import base
from moe_jax import accounts, assembly, sharding
from moe_jax.layers import Cached
from moe_jax.models.stack import layer_salts
from moe_jax.routing.hash_layer import mix

pytestmark = pytest.mark.numerics

# The tokens of the source are below 20, and those of the target are from 20 on.
V, L, M = 40, 6, 9
SIZES = {
  "family": "encoder_decoder",
  "d_model": 16,
  "num_layers": 1,
  "num_heads": 2,
  "num_kv_heads": 2,
  "head_dim": 4,
  "d_ff": 24,
  "position": "relative",
  "relative_buckets": 8,
  "relative_max_distance": 16,
  "moe": {"first": 0, "num_experts": 4, "d_ff": 12, "dispatcher": {"name": "einsum"}},
}


def configured(**changes):
  c = base.get_config()
  c.model.update(SIZES)
  c.model.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in changes.items()}
  )
  return c


def make(**changes):
  return assembly.model(configured(**changes), V, sharding.make_mesh({"data": 1}))


def packed(documents, length, first):
  """Returns tokens, segment_ids and positions of rows, for the lengths of each row's documents.

  The tokens of a row are distinct and at least `first`. The rest of a row is padding.
  """
  tokens = np.stack(
    [first + np.random.default_rng(i).permutation(20)[:length] for i in range(len(documents))]
  )
  segments, positions = np.zeros((2, len(documents), length), np.int32)
  for r, lengths in enumerate(documents):
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    segments[r, : len(ids)] = ids
    positions[r, : len(ids)] = np.concatenate([np.arange(n) for n in lengths])
  return tuple(jnp.asarray(a, jnp.int32) for a in (tokens, segments, positions))


def pair(targets, sources, length=L, source_length=M):
  """Returns a batch (tokens, segment_ids, positions, {the same three arrays of the source})."""
  source = packed(sources, source_length, 0)
  return *packed(targets, length, 20), dict(
    zip(("tokens", "segment_ids", "positions"), source, strict=True)
  )


def call(model, variables, batch, train=False, **kwargs):
  return model.apply(variables, *batch[:3], train=train, encoder=batch[3], **kwargs)


def run(model, variables, batch, return_routing=False, dropless=False, **others):
  apply = tiny.applied(model, train=False, return_routing=return_routing, dropless=dropless)
  return apply(variables, batch[:3], others | {"encoder": batch[3]})


def initialise(model):
  ids = jnp.ones((1, 6), jnp.int32)
  return tiny.weights(model, ids, ids, ids)


def close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, b)


def test_what_a_position_sees():
  # A row has two pairs of source and target. Each target token sees the tokens of its target up to
  # itself and all tokens of its source, and the encoder is bidirectional. All tokens are distinct
  # and the output is untied, so that the gradient with respect to an embedding says who sees whom.
  # Catches a causal encoder, a decoder that is not causal, attention across segments, and a missing
  # cross-attention.
  model = make(tied_embeddings=False)
  batch = tokens, segments, _, source = pair([[2, 3]], [[4, 4]])
  params = initialise(model)["params"]

  def outputs(embedding):
    return jnp.sum(
      jnp.sin(call(model, {"params": params | {"embedding": embedding}}, batch)[0][0]), axis=-1
    )  # [L]

  by_token = np.abs(tiny.quick_jit(jax.jacrev(outputs))(params["embedding"])).max(axis=-1) > 1e-8
  real = np.asarray(segments[0]) > 0
  same = np.asarray(segments[0][:, None] == segments[0])
  np.testing.assert_array_equal(by_token[real][:, tokens[0]], np.tril(same)[real] & real)
  np.testing.assert_array_equal(
    by_token[real][:, source["tokens"][0]],
    np.asarray(segments[0][:, None] == source["segment_ids"][0])[real],
  )

  def memory(embedding):
    """Returns the sum of the features of each token of the encoder's output."""
    _, state = call(
      model,
      {"params": params | {"embedding": embedding}},
      batch,
      mutable=["intermediates"],
      capture_intermediates=lambda module, _: module.name == "encoder",
    )
    return jnp.sum(jnp.sin(state["intermediates"]["encoder"]["__call__"][0][0][0]), axis=-1)  # [M]

  by_token = np.abs(tiny.quick_jit(jax.jacrev(memory))(params["embedding"])).max(axis=-1)
  sees = by_token[:8, source["tokens"][0, :8]] > 1e-8
  np.testing.assert_array_equal(sees, np.kron(np.eye(2), np.ones((4, 4))) > 0)


def test_padding_changes_nothing():
  # Source and target get rows and tokens of padding. Catches padding that is attended to, takes
  # slots or counts in a loss or a metric.
  model = make(moe__capacity_factor=1.0, moe__group_size=3)
  targets, sources = [[3], [6]], [[9], [6]]
  batch = pair(targets, sources)
  variables = initialise(model)
  logits, aux = run(model, variables, batch)
  longer = pair([*targets, [0], [0]], [*sources, [0], [0]], length=L + 3, source_length=M + 3)

  def place(old, new):
    """Keeps the real tokens, whatever the padding holds."""
    return new.at[:2, : old.shape[1]].set(old)

  longer = jax.tree.map(place, batch, longer)
  padded, padded_aux = run(model, variables, longer)
  real = np.asarray(batch[1] > 0)
  close(padded[:2, :L][real], logits[real])
  close(padded_aux.losses, aux.losses)
  close(padded_aux.metrics["load"], aux.metrics["load"])


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_cached_target_gets_the_logits_of_the_whole_target(scan_layers):
  # The rows have sources of different lengths. Catches keys of the memory that are not kept, or
  # that are those of another layer, a source whose padding is seen, and an encoder that drops
  # tokens for lack of capacity.
  model = make(num_layers=2, scan_layers=scan_layers, moe__capacity_factor=0.5)
  batch = tokens, segments, positions, source = pair([[L], [L]], [[9], [5]])
  variables = initialise(model)
  expected, _ = run(model, variables, batch, dropless=True)

  @functools.partial(tiny.quick_jit, static_argnames="length")
  def read(cache, index, length, **encoder):
    part = [
      jax.lax.dynamic_slice_in_dim(array, index, length, axis=1)
      for array in (tokens, segments, positions)
    ]
    (logits, _), cache = model.apply(
      {**variables, **cache},
      *part,
      train=False,
      cached=Cached(index, segments),
      mutable=["cache"],
      **encoder,
    )
    return logits[:, 0], cache

  logits, cache = read({}, jnp.int32(0), 2, encoder=source)
  close(logits, expected[:, 1])
  for index in range(2, L):
    logits, cache = read(cache, jnp.int32(index), 1)
    close(logits, expected[:, index])


def _unrolled(params, layers):
  """Returns the parameters of a scanned stack of period 2 under the names of single layers."""
  params = dict(params)
  repeats = params.pop("repeats")
  return params | {
    f"layer_{i}": jax.tree.map(operator.itemgetter(i // 2), repeats[f"layer_{i % 2}"])
    for i in range(layers)
  }


@pytest.mark.parametrize("derived", [False, pytest.param(True, marks=pytest.mark.every_variant)])
def test_scanned_layers_equal_unrolled_layers(derived):
  # The gradient reaches the encoder only through the memory that the scan broadcasts. Catches a
  # memory without gradient, a bias row of the wrong stack (the encoder's come first), and losses of
  # only one stack.
  changes = dict(num_layers=4, moe__first=1, moe__balancing__rule="sign", moe__balancing__rate=0.1)
  scanned, unrolled = make(**changes), make(**changes, scan_layers=False)
  batch = pair([[3, 3], [6]], [[9], [5, 4]])
  variables = initialise(scanned)
  bias = jnp.asarray([[0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2], [2, 0, 0, 0]], jnp.float32)

  def unroll(params):
    return params | {name: _unrolled(params[name], 4) for name in ("encoder", "decoder")}

  assert jax.tree.structure(unroll(variables["params"])) == jax.tree.structure(
    initialise(unrolled)["params"]
  )

  def loss(model, unroll, params):
    logits, aux = call(
      model, {"params": unroll(params), "router_state": {"bias": bias}}, batch, return_routing=True
    )
    return jnp.mean(jnp.square(logits) * (batch[1] > 0)[..., None]) + aux.losses["balance"], (
      logits,
      aux,
    )

  def run(f):
    return jax.value_and_grad(f, has_aux=True) if derived else lambda params: (f(params), params)

  both = [
    tiny.quick_jit(run(functools.partial(loss, model, names)))(variables["params"])
    for model, names in ((scanned, lambda p: p), (unrolled, unroll))
  ]
  close(*both)
  (_, (_, aux)), gradient = both[0]
  assert not derived or all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient["encoder"]))
  # One of the two experts of each token is the expert that the bias prefers.
  assert (
    aux.metrics["load"].shape == (4, 4)
    and [float(aux.metrics["load"][i, e]) for i, e in enumerate((1, 2, 3, 0))] == [0.5] * 4
  )
  assert aux.metrics["top1_expert"].shape == (2, 2, L) and aux.metrics[
    "encoder_top1_expert"
  ].shape == (2, 2, M)


@pytest.mark.every_variant
@pytest.mark.parametrize(
  "changes", [{}, {"remat": "full"}, {"scan_layers": False}], ids=["scan", "remat", "unrolled"]
)
def test_gradients_of_one_table_of_relative_biases_a_stack(changes):
  _one_table_of_relative_biases_a_stack(changes, lambda f: jax.value_and_grad(f, has_aux=True))


def test_one_table_of_relative_biases_a_stack():
  _one_table_of_relative_biases_a_stack({}, None)


def _one_table_of_relative_biases_a_stack(changes, derive):
  # The shared table computes the same function as a table per layer if all of these hold the same
  # values, and its gradient is the sum of theirs. Catches a table that only the first layers read,
  # one table for both stacks, and a gradient of the last layer only.
  unshared = make(num_layers=4, moe__first=1)  # scanned, with a table per layer
  shared = make(num_layers=4, moe__first=1, relative_shared=True, **changes)
  batch = pair([[3, 3], [6]], [[9], [5, 4]])
  variables = initialise(shared)["params"]
  tables = {name: variables[name]["relative_bias"] for name in ("encoder", "decoder")}
  assert {table.shape for table in tables.values()} == {(2, 8)}
  assert not np.allclose(tables["encoder"], tables["decoder"])

  def loss(model, params):
    logits, aux = call(model, {"params": params}, batch)
    return jnp.mean(jnp.square(logits) * (batch[1] > 0)[..., None]) + aux.losses["balance"], logits

  def spread(params):
    """Copies the shared tables to each layer of the scan."""
    params = dict(params)
    for name in ("encoder", "decoder"):
      stack = dict(params[name])
      table = stack.pop("relative_bias")
      if "repeats" not in stack:
        stack["repeats"] = {
          f"layer_{i}": jax.tree.map(
            lambda *leaves: jnp.stack(leaves), stack.pop(f"layer_{i}"), stack.pop(f"layer_{i + 2}")
          )
          for i in range(2)
        }
      stack["repeats"] = {
        layer: leaf | {"attention": leaf["attention"] | {"relative_bias": jnp.stack([table] * 2)}}
        for layer, leaf in stack["repeats"].items()
      }
      params[name] = stack
    return params

  if not derive:
    close(
      run(shared, {"params": variables}, batch), run(unshared, {"params": spread(variables)}, batch)
    )
    return
  output, gradient = tiny.quick_jit(derive(functools.partial(loss, shared)))(variables)
  expected, by_layer = tiny.quick_jit(derive(functools.partial(loss, unshared)))(spread(variables))
  close(output, expected)
  for name in ("encoder", "decoder"):
    layers = [
      by_layer[name]["repeats"][f"layer_{i}"]["attention"]["relative_bias"] for i in range(2)
    ]
    assert all(np.abs(each).max() > 1e-5 for each in layers)
    np.testing.assert_allclose(
      gradient[name]["relative_bias"],
      sum(each.sum(axis=0) for each in layers),
      atol=1e-6,
      rtol=1e-4,
    )

  def rest(tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf * (path[-1].key != "relative_bias"), tree
    )

  close(rest(spread(gradient)), rest(by_layer))


@pytest.mark.every_variant
def test_stored_plans_are_followed_by_both_stacks():
  # Catches a decoder that follows the encoder's plan, and a plan that is not passed on.
  model, batch = make(), pair([[6]], [[9]])
  variables = initialise(model)
  _, aux = run(model, variables, batch, return_routing=True)
  flipped = jax.tree_util.tree_map_with_path(
    lambda path, w: -5 * w if path[-1].key == "router" else w, variables["params"]
  )
  stored = {"encoder": aux.metrics["encoder_plan"], "decoder": aux.metrics["plan"]}
  _, other = run(model, {"params": flipped}, batch, return_routing=True)
  _, replayed = run(model, {"params": flipped}, batch, return_routing=True, stored=stored)
  for name in ("encoder_plan", "plan"):
    assert np.any(other.metrics[name].expert != aux.metrics[name].expert)
    jax.tree.map(np.testing.assert_array_equal, replayed.metrics[name], aux.metrics[name])


def test_the_source_must_be_there():
  # Catches an encoder that reads the target if it gets no source.
  model, batch = make(moe__num_experts=0), pair([[6]], [[9]])
  variables = initialise(model)
  with pytest.raises(ValueError, match="encoder: tokens, segment_ids, positions missing"):
    model.apply(variables, *batch[:3], train=False)
  with pytest.raises(ValueError, match="encoder: positions missing"):
    model.apply(
      variables,
      *batch[:3],
      train=False,
      encoder={k: v for k, v in batch[3].items() if k != "positions"},
    )


def test_the_two_scales_of_a_tied_embedding_are_one_function():
  # Compares T5's scales (standard deviation 1 and logits divided by sqrt(D)) with a standard
  # deviation of 1/sqrt(D) and rows times sqrt(D). Catches a factor that is missing on either side,
  # and initial embeddings that do not differ by the factor sqrt(D).
  batch = pair([[6]], [[9]])
  scaled, plain = make(embed_scale=True), make(embed_scale=False)
  ids = jnp.ones((1, 6), jnp.int32)
  first, first2 = (tiny.first_embedding(model, ids, ids, ids) for model in (scaled, plain))
  close(first2, 4 * first)
  params = initialise(scaled)["params"] | {"embedding": first}
  close(
    run(scaled, {"params": params}, batch)[0],
    run(plain, {"params": params | {"embedding": first2}}, batch)[0],
  )


def test_a_target_vocabulary_of_its_own():
  # Catches targets that are looked up in the source's embedding, and logits over the source's
  # vocabulary.
  model = make(target_vocab_size=48, vocab_size=64)
  variables = initialise(model)
  shapes = {
    name: leaf.shape for name, leaf in variables["params"].items() if name.endswith("embedding")
  }
  assert shapes == {"embedding": (64, 16), "target_embedding": (48, 16)}
  batch = pair([[6]], [[9]])
  logits, _ = run(model, variables, batch)
  assert logits.shape == (1, L, 48)

  def table(name, rows):
    return {"params": variables["params"] | {name: variables["params"][name].at[rows].add(1.0)}}

  assert np.array_equal(run(model, table("embedding", batch[0][0]), batch)[0], logits)
  assert not np.allclose(run(model, table("embedding", batch[3]["tokens"][0]), batch)[0], logits)


def test_dropout_only_in_training():
  # Catches dropout at evaluation.
  model, plain, batch = make(dropout=0.5), make(), pair([[6]], [[9]])
  variables = initialise(model)
  train = tiny.quick_jit(
    lambda key: call(model, variables, batch, train=True, rngs={"dropout": key, "router": key})[0]
  )
  assert not np.allclose(train(jax.random.key(0)), train(jax.random.key(1)))
  close(run(model, variables, batch)[0], run(plain, variables, batch)[0])


@pytest.mark.every_variant
def test_a_mesh_computes_the_same():
  # Catches a loss of only one shard, and a memory whose rows are not those of its targets. Also
  # catches a gradient of only one shard for the shared table of relative biases, whose heads are
  # split.
  batch = pair(
    [[3, 3], [6], [4], [6], [2, 2], [6], [5], [6]], [[4, 5], [9], [9], [6], [3, 3], [9], [7], [9]]
  )
  model = make(moe__num_shared_experts=1, relative_shared=True)
  variables = initialise(model)

  def loss(params, batch):
    logits, aux = call(model, {"params": params}, batch)
    return jnp.mean(jnp.square(logits) * (batch[1] > 0)[..., None]) + sum(aux.losses.values()), aux

  step = jax.value_and_grad(loss, has_aux=True)
  expected = tiny.quick_jit(step)(variables["params"], batch)
  ids = jnp.ones((8, L), jnp.int32)
  boxed = jax.eval_shape(lambda key: model.init(key, ids, ids, ids, train=False), jax.random.key(0))
  mesh = sharding.make_mesh({"data": 2, "expert": 2, "tensor": 2})
  placed = sharding.param_shardings(mesh, boxed)["params"]
  assert placed["encoder"]["relative_bias"].spec[0] == "tensor"
  with jax.set_mesh(mesh):
    rows = sharding.batch_sharding(mesh)
    value = tiny.quick_jit(step, in_shardings=(placed, rows))(
      jax.device_put(variables["params"], placed), jax.device_put(batch, rows)
    )
  close(expected, value)


def encdec(d, f, a, L, glu, E=0, n_moe=0, tied=True, V=32128, extra=0):
  """Returns the parameters of T5 and its descendants by the papers' own arithmetic.

  Tables of relative biases are not counted.
  """
  ffn = (3 if glu else 2) * d * f
  base = (
    (2 * L - n_moe) * ffn + extra * ffn + 4 * L * d * a + 8 * L * d * a + V * d * (1 if tied else 2)
  )
  return base + n_moe * d * E + d * (5 * L + 2) + n_moe * E * ffn


def gshard(E, L, d, f, a, source, target):
  """Returns the parameters of GShard with L encoder and decoder layers together, without norms."""
  n = L // 2
  return (
    (L - n) * 2 * d * f
    + n * 4 * d * a
    + n * 8 * d * a
    + n * d * E
    + (source + target) * d
    + n * E * 2 * d * f
  )


@pytest.mark.parametrize(
  "experts, tied, extra, glu",
  [(0, True, False, False), (4, True, False, False), (4, False, True, True)],
)
def test_parameters_of_t5_and_its_descendants(experts, tied, extra, glu):
  # Catches an additional norm or projection, a table that is counted twice, and experts in the
  # wrong number of layers.
  c = configured(
    num_layers=4,
    moe__num_experts=experts,
    moe__first=1,
    moe__d_ff=24,
    tied_embeddings=tied,
    activation="geglu" if glu else "relu",
    moe__extra_ffn=extra,
  )
  total, _ = accounts.parameter_counts(c, V)
  tables = 2 * 4 * 2 * 8  # 2 stacks of 4 self-attentions, with 2 heads x 8 buckets each
  n_moe = 4 if experts else 0
  norms = 4 * extra * 16  # norms of the extra FFNs
  assert total - tables - norms == encdec(
    16, 24, 8, 4, glu, experts, n_moe, tied, V, extra=4 * extra
  )


def test_parameters_of_t5_base():
  # Catches a shape that is right only for the ratios of heads * head_dim, d_model and d_ff in the
  # tiny model.
  c = configured(
    d_model=768,
    d_ff=3072,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    activation="relu",
    vocab_size=32128,
    moe__num_experts=0,
    relative_buckets=32,
    relative_max_distance=128,
  )
  assert (
    accounts.parameter_counts(c, V)[0]
    == 222_902_784 + 24 * 12 * 32
    == encdec(768, 3072, 768, 12, False) + 9216
  )
  # With one table per stack, there are 222,903,552 parameters as in Hugging Face's t5-base.
  c.model.relative_shared = True
  assert accounts.parameter_counts(c, V)[0] == 222_902_784 + 2 * 12 * 32 == 222_903_552


def test_parameters_of_gshard():
  # In each stack every second layer has experts, and each side has a vocabulary. The count by hand
  # has no norms, which are subtracted.
  c = configured(
    num_layers=4,
    num_encoder_layers=4,
    moe__first=1,
    moe__d_ff=24,
    activation="relu",
    position="none",
    vocab_size=64,
    target_vocab_size=48,
  )
  assert accounts.parameter_counts(c, V)[0] - 16 * (5 * 4 + 2) == gshard(4, 8, 16, 24, 8, 64, 48)
  assert (
    accounts.parameter_counts(c, V)[0]
    > accounts.parameter_counts(
      configured(**{"num_layers": 4, "num_encoder_layers": 2, "moe__first": 1}), V
    )[0]
  )


def test_encoder_and_decoder_hash_by_the_place_in_the_whole_model():
  # Catches salts that are numbered from 0 again in the decoder, so that its layers hash like the
  # encoder's, and a seed that does not reach the towers.
  model, batch = (
    make(moe__router__name="hash_layer", num_layers=2, moe__every=1).clone(seed=3),
    pair([[6]], [[9]]),
  )
  # These metrics do not depend on any weight, so that XLA computes nothing else.
  names = ("encoder_top1_expert", "top1_expert")

  def routed(key):
    aux = tiny.at_first(model, key, *batch[:3], encoder=batch[3], train=False, return_routing=True)[
      1
    ]
    return [aux.metrics[name] for name in names]

  by_encoder, by_decoder = tiny.quick_jit(routed)(jax.random.key(0))
  salts = layer_salts(3, 4)

  def hashes(tokens, salts):
    return np.stack([mix(tokens, mix(salt, 0)) % 4 for salt in salts])

  np.testing.assert_array_equal(by_encoder, hashes(batch[3]["tokens"], salts[:2]))
  np.testing.assert_array_equal(by_decoder, hashes(batch[0], salts[2:]))
