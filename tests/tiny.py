"""Configs, models and text for end-to-end tests, with a few thousand weights and kilobytes."""

import functools
import pathlib
import random

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import options
from moe_jax.dispatch import CapacityOptions
from moe_jax.layers import LOSSES, GateOptions, GroupOptions, LossOptions

# The changes of configs/base.py, in the form of command-line overrides, so that tests train the
# same model in this process and in others.
OVERRIDES = {
  "model.d_model": 16,
  "model.num_layers": 1,
  "model.num_heads": 2,
  "model.num_kv_heads": 2,
  "model.head_dim": 8,
  "model.d_ff": 32,
  "model.moe.first": 0,
  "model.moe.d_ff": 32,
  "model.moe.num_experts": 4,
  "model.moe.dispatcher.name": "einsum",  # the dispatcher that compiles fastest
  "data.seq_len": 32,
  "data.threads": 1,
  "data.validation_fraction": 0.3,
  "train.batch_size": 4,
  "train.steps": 6,
  "train.log_every": 2,
  "train.eval_every": 3,
  "train.eval_batches": 1,
  "train.checkpoint_every": 2,
  "optimizer.warmup_steps": 2,
  "mesh.data": 1,
}
# A `jax.jit` that compiles faster, because XLA optimises less.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
WORDS = (
  "the expert routes a token to one of many small networks and each learns what it sees best"
).split()


def weights(model, *inputs, seed=0, **kwargs):
  """Returns random variables of a model, in which scales of norms are 1 and no bias is 0.

  They are drawn with NumPy, because compiling Flax's initialisers would take as long as compiling
  the program that is tested.

  Args:
    model: The Flax module.
    *inputs: Inputs of the model, of which only the shapes matter.
    seed: The seed of the random numbers.
    **kwargs: Keyword arguments of the model.
  """
  shapes = nn.unbox(
    jax.eval_shape(lambda key: model.init(key, *inputs, train=False, **kwargs), jax.random.key(0))
  )
  draw = np.random.default_rng(seed)

  def draw_leaf(path, leaf):
    if path[0].key != "params":
      return np.zeros(leaf.shape, leaf.dtype)
    ones = path[-1].key in ("scale", "hidden_bias")
    return (ones + 0.25 * (path[-1].key != "scale") * draw.normal(size=leaf.shape)).astype(
      leaf.dtype
    )

  return jax.tree.map(jax.numpy.asarray, jax.tree_util.tree_map_with_path(draw_leaf, shapes))


@functools.cache
def applied(model, **kwargs):
  """Returns a compiled f(variables, inputs, others) that applies a model.

  Calls with the same arguments return the same function, which is compiled once. `others` are
  keyword arguments that may be arrays, and `kwargs` are static.
  """
  return quick_jit(
    lambda variables, inputs, others: model.apply(variables, *inputs, **others, **kwargs)
  )


def first_embedding(model, *inputs):
  """Returns the initial embedding of a model.

  The function returns nothing else, so that XLA removes the initialisation of all other weights.
  """

  def first(key):
    return model.init(key, *inputs, train=False)["params"]["embedding"].unbox()

  return quick_jit(first)(jax.random.key(0))


def often(chosen, values):
  """Returns `values` as parameters of a test; `make test` uses only those in `chosen`.

  `make test-all` uses them all.
  """
  cases = [value if isinstance(value, tuple) else (value,) for value in values]
  return [
    pytest.param(*case, marks=() if value in chosen else pytest.mark.every_variant)
    for case, value in zip(cases, values, strict=True)
  ]


def at_first(model, keys, *inputs, **kwargs):
  """Initialises a model and returns its (logits, Aux).

  Args:
    model: The Flax module.
    keys: The PRNG keys, as for `init`.
    *inputs: The inputs of the model.
    **kwargs: Keyword arguments of the model.
  """
  variables = model.init(keys, *inputs, **kwargs)
  return model.apply(variables, *inputs, rngs=keys if isinstance(keys, dict) else None, **kwargs)


def write_corpus(directory: pathlib.Path) -> pathlib.Path:
  """Writes text files into a folder, which are the same each time, and returns the folder."""
  directory.mkdir(parents=True, exist_ok=True)
  draw = random.Random(0)
  for i in range(40):
    (directory / f"{i:02}.txt").write_text(" ".join(draw.choices(WORDS, k=60)) + "\n")
  return directory


def overrides(directory: pathlib.Path, **changes) -> dict:
  """Returns `OVERRIDES` for a corpus in `directory`, with changes, where `__` stands for a dot."""
  corpus = write_corpus(directory / "corpus")
  paths = {"data.sources": (f"text:{corpus}/*.txt",), "data.cache_dir": str(directory / "cache")}
  return OVERRIDES | paths | {key.replace("__", "."): value for key, value in changes.items()}


def flags(directory: pathlib.Path, **changes) -> list[str]:
  """Returns `overrides` as command-line flags."""
  return [f"--config.{key}={value}" for key, value in overrides(directory, **changes).items()]


def config(directory: pathlib.Path, **changes):
  """Returns configs/base.py with `overrides`, as a ConfigDict."""
  from configs import base

  c = base.get_config()
  c.update_from_flattened_dict(overrides(directory, **changes))
  return c


def shrink(c, directory: pathlib.Path):
  """Shrinks the config of a paper to about the size of `OVERRIDES`, and returns it.

  The architecture and the routing stay the same. Each stack gets four layers, which suffices for at
  least one layer with experts in the config of each paper, and each layer at most 16 experts.
  """
  from configs import shared

  c = shared.desk(c)
  m, e = c.model, c.model.moe
  m.lstm_units = 16 * m.lstm_units // m.d_model
  m.rotary_dim //= 2
  m.d_model, m.num_heads, m.head_dim, m.d_ff = 16, 4, 8, 32
  m.latent.update(
    {
      "kv_rank": 8,
      "query_rank": 8 if m.latent.query_rank else 0,
      "nope_dim": 8,
      "rope_dim": 4,
      "value_dim": 8,
    }
  )
  e.d_ff, e.dispatcher.name = 4, "einsum"
  taken = ("data", "train.batch", "train.eval_batches", "mesh")
  c.update_from_flattened_dict(
    {key: value for key, value in overrides(directory).items() if key.startswith(taken)}
  )
  if c.data.objective == "span_corruption":
    c.data.encoder_len, c.data.seq_len = 48, 32
  c.optimizer.schedule, c.optimizer.warmup_steps = "constant", 0
  c.train.log_every = c.train.eval_every = c.train.checkpoint_every = 1
  return c


def loss_options(*names, **keys):
  """Returns options in which exactly these losses are used, each with weight 1."""
  return LossOptions(**{f"{name}_loss": float(name in names) for name in LOSSES}, **keys)


def moe_fields(**keys):
  """Returns fields of a `MoeLayer`, with keys of `model.moe` gathered into the fields for them."""
  fields = {}
  sections = {"gate": GateOptions, "groups": GroupOptions, "capacity": CapacityOptions}
  for name, section in sections.items():
    section_keys = {key: keys.pop(key) for key in options.keys(section) if key in keys}
    if section_keys:
      fields[name] = section(**section_keys)
  return fields | keys
