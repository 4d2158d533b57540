"""Decoding with a cache is compared with whole forward passes that keep nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoder_inputs import L, V, make

from moe_jax import sharding
from moe_jax.generation import Sampling, generate_tokens, stream_tokens
from moe_jax.layers import Cached

pytestmark = pytest.mark.numerics

RELATIVE = {"position": "relative", "relative_buckets": 4, "relative_max_distance": 3}
LATENT = {
  "attention": "latent",
  "latent": {"kv_rank": 6, "query_rank": 5, "nope_dim": 4, "rope_dim": 2, "value_dim": 3},
}
# D M D M, of which one repetition is compiled. With a capacity, the model would drop tokens if
# decoding were not dropless.
DEEP = {
  "num_layers": 4,
  "moe__first": 1,
  "moe__every": 2,
  "moe__balancing__rule": "sign",
  "moe__balancing__rate": 0.1,
  "moe__capacity_factor": 0.5,
}
# As DEEP, with experts without an FFN, to which the bias is added, too.
ZERO = DEEP | {
  "moe__zero_experts": 1,
  "moe__copy_experts": 1,
  "moe__constant_experts": 2,
  "moe__gate_residual": True,
  "moe__routed_scale": 2.0,
}
BRAINFORMER = {
  "family": "brainformer",
  "num_layers": 2,
  "block": ("attention:width=8,heads=2", "moe:gate=top_2"),
}
LSTM = {"family": "lstm", "num_layers": 2, "lstm_units": 24, "moe__num_shared_experts": 1}
CASES = {
  "rope": DEEP,
  "unrolled": DEEP | {"scan_layers": False, "num_layers": 3},
  "window": {"sliding_window": 3, "moe__capacity_factor": 0.5},
  # Windows and whole rows in turn; a row of cache is 3 places or all.
  "global": DEEP
  | {"sliding_window": 3, "global_every": 2, "global_positions": False, "sinks": True},
  "relative": RELATIVE | {"moe__extra_ffn": True},
  "relative_shared": RELATIVE | {"relative_shared": True, "sliding_window": 2},
  "latent": LATENT,
  "zero_experts": ZERO,
  "brainformer": BRAINFORMER,
  "lstm": LSTM,
}
# Two rows of different lengths, which begin at different places of the padded row.
LENGTHS = (L, L - 3)


def setup(changes):
  """Returns a model, random variables, the router state included, and tokens of two rows."""
  model = make(**changes)
  tokens = np.random.default_rng(0).integers(0, V, (2, L)).astype(np.int32)
  ones = jnp.ones((2, L), jnp.int32)
  variables = tiny.weights(model, ones, ones, ones)
  if "router_state" in variables:
    bias = np.random.default_rng(1).normal(size=variables["router_state"]["bias"].shape)
    variables["router_state"] = {"bias": jnp.asarray(bias, jnp.float32)}
  return model, variables, tokens


@functools.partial(tiny.quick_jit, static_argnums=0)
def whole(model, variables, tokens):
  """Returns the logits of whole rows without padding or cache."""
  places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  return model.apply(variables, tokens, jnp.ones_like(tokens), places, train=False, dropless=True)[
    0
  ]


def step(model, variables, cache, tokens, segments, index):
  """Reads some tokens and returns the logits after the last of them, and the cache."""
  length = tokens.shape[1]
  positions = jnp.maximum(index + jnp.arange(length) - (segments == 0).sum(1, keepdims=True), 0)
  here = jax.lax.dynamic_slice_in_dim(segments, index, length, axis=1)
  (logits, _), cache = model.apply(
    {**variables, **cache},
    tokens,
    here,
    positions,
    train=False,
    cached=Cached(index, segments),
    mutable=["cache"],
  )
  return logits[:, 0], cache


@pytest.mark.parametrize(
  "case", tiny.often({"rope", "window", "relative_shared", "latent", "lstm"}, CASES)
)
def test_cached_logits_equal_those_of_the_whole_row(case):
  # Catches a cache that is read or written one place early or late, a ring that forgets too early
  # or too late, padding that is seen, positions that count padding, a state that is not carried,
  # scanned layers that share a cache, and tokens that are dropped for lack of capacity.
  model, variables, tokens = setup(CASES[case])
  # The prompts are the first 3 tokens and 1 token, so that the last row begins with padding.
  segments = jnp.ones((2, L), jnp.int32).at[1, : LENGTHS[0] - LENGTHS[1]].set(0)
  rows = tokens.copy()
  rows[1] = np.roll(tokens[1], LENGTHS[0] - LENGTHS[1])
  compiled = tiny.quick_jit(step, static_argnums=0)
  logits, cache = compiled(model, variables, {}, rows[:, :4], segments, jnp.int32(0))
  cached = [logits]
  for place in range(4, L):
    token = rows[:, place : place + 1]
    logits, cache = compiled(model, variables, cache, token, segments, jnp.int32(place))
    cached.append(logits)
  cached = np.stack(cached, axis=1)  # after the places 3 to L - 1
  expected = whole(model, variables, tokens)
  np.testing.assert_allclose(cached[0], expected[0, 3:], atol=1e-5)
  np.testing.assert_allclose(cached[1], expected[1, : LENGTHS[1]], atol=1e-5)


def greedy(model, variables, prompt, count):
  """Returns the most likely tokens after a prompt, by whole forward passes."""
  row = list(prompt)
  for _ in range(count):
    padded = np.zeros((1, L), np.int32)
    padded[0, : len(row)] = row
    # Causal attention and dropless routing let no logits depend on the zeros after them.
    row.append(int(np.argmax(whole(model, variables, jnp.asarray(padded))[0, len(row) - 1])))
  return row[len(prompt) :]


def generate(model, variables, prompts, count, sampling=None, **options):
  keys = jax.random.split(jax.random.key(0), count)
  return generate_tokens(model, variables, prompts, keys, sampling or Sampling(), **options)


@functools.cache
def plain():
  return setup({"sliding_window": 3})


def test_greedy_tokens_are_those_of_whole_forward_passes():
  # Catches a prompt of another row, logits after padding, and a first token that is drawn twice.
  model, variables, tokens = plain()
  prompts = [tokens[0, :3].tolist(), tokens[1, :1].tolist()]
  drawn = generate(model, variables, prompts, 5)
  assert drawn.tolist() == [greedy(model, variables, prompt, 5) for prompt in prompts]


def test_room_for_longer_prompts_changes_no_token():
  # Catches a prompt behind whose padding other positions or other keys are used.
  model, variables, tokens = plain()
  prompts, how = [tokens[0, :3].tolist(), tokens[1, :1].tolist()], Sampling(temperature=1.0)
  expected = generate(model, variables, prompts, 4, how)
  assert generate(model, variables, prompts, 4, how, room=5).tolist() == expected.tolist()


def test_a_row_ends_after_a_stop_token_and_others_go_on():
  # Catches a stop token that is left out, tokens after it, and a stop that ends all rows.
  model, variables, tokens = plain()
  prompts = [tokens[0, :3].tolist(), tokens[1, :1].tolist()]
  # The first row draws different tokens, of which the second is the one to stop at.
  free = generate(model, variables, prompts, 5, Sampling(temperature=9.0))
  stop = int(free[0, 1])
  stopped = generate(model, variables, prompts, 5, Sampling(temperature=9.0), stop=(stop,))
  for before, after in zip(free.tolist(), stopped.tolist(), strict=True):
    count = before.index(stop) + 1 if stop in before else 5
    assert after == before[:count] + [-1] * (5 - count)
  assert (stopped[0] == -1).sum() == 3


@pytest.mark.parametrize("at_once", [1, 2])
def test_streamed_tokens_are_those_of_one_program(at_once):
  # Catches a piece that repeats or leaves out a token, and a key that is used twice.
  model, variables, tokens = plain()
  prompts, keys = (
    [tokens[0, :3].tolist(), tokens[1, :1].tolist()],
    jax.random.split(jax.random.key(0), 5),
  )
  how = Sampling(temperature=1.0, top_k=8)
  pieces = list(stream_tokens(model, variables, prompts, keys, how, at_once=at_once))
  assert [piece.shape[1] for piece in pieces] == ([1] * 5 if at_once == 1 else [2, 2, 1])
  drawn = generate(model, variables, prompts, 5, how)
  np.testing.assert_array_equal(np.concatenate(pieces, axis=1), drawn)


def test_only_allowed_tokens_are_drawn():
  # Catches a mask that is not applied, or applied to the first token only.
  model, variables, tokens = plain()
  allowed = np.arange(V - 4) == 5
  assert (generate(model, variables, [tokens[0, :3].tolist()], 4, allowed=allowed) == 5).all()


def test_bad_input():
  # Catches an empty prompt, whose logits would be those of padding.
  model, variables, _ = plain()
  with pytest.raises(ValueError, match="prompt"):
    generate(model, variables, [[1], []], 1)
  with pytest.raises(ValueError, match="allowed"):
    generate(model, variables, [[1]], 1, allowed=np.zeros(V, bool))


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"expert": 2}], ids=str)
def test_a_mesh_changes_no_token(sizes):
  # Catches a cache whose heads or rows are on other devices than the queries, experts that are
  # applied by no device or by two, and results that one process cannot read.
  model, variables, tokens = setup({"num_kv_heads": 2})
  prompts = [tokens[0, :3].tolist(), tokens[1, :1].tolist()]
  alone = generate(model, variables, prompts, 4)
  mesh = sharding.make_mesh(sizes)
  shapes = jax.eval_shape(
    lambda key, *ids: model.init(key, *ids, train=False),
    jax.random.key(0),
    *[jnp.ones((1, L), int)] * 3,
  )
  placed = jax.device_put(variables, sharding.param_shardings(mesh, shapes))
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(generate(model, placed, prompts, 4), alone)
