"""A model of a few thousand weights on a few kilobytes of text: what end-to-end tests train."""

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

# As command-line overrides, so that tests in this process and in others train the same thing.
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
  "model.moe.dispatcher.name": "einsum",  # compiles fastest
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
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiles faster
WORDS = (
  "the expert routes a token to one of many small networks and each learns what it sees best"
).split()


def weights(model, *inputs, seed=0, **kwargs):
  """Random variables of a model; scales of norms are 1, and no bias is 0.

  Drawn by NumPy: compiling what Flax draws them with would take as long as compiling what a test is
  about.
  """
  shapes = nn.unbox(
    jax.eval_shape(lambda key: model.init(key, *inputs, train=False, **kwargs), jax.random.key(0))
  )
  draw = np.random.default_rng(seed)

  def one(path, leaf):
    if path[0].key != "params":
      return np.zeros(leaf.shape, leaf.dtype)
    ones = path[-1].key in ("scale", "hidden_bias")
    return (ones + 0.25 * (path[-1].key != "scale") * draw.normal(size=leaf.shape)).astype(
      leaf.dtype
    )

  return jax.tree.map(jax.numpy.asarray, jax.tree_util.tree_map_with_path(one, shapes))


@functools.cache
def applied(model, **kwargs):
  """The compiled `f(variables, inputs, others)` that applies a model; calls with the same arguments
  share it."""
  return quick_jit(
    lambda variables, inputs, others: model.apply(variables, *inputs, **others, **kwargs)
  )


def first_embedding(model, *inputs):
  """The embedding that a model begins with. Nothing else is asked for, so that XLA draws nothing
  else."""

  def first(key):
    return model.init(key, *inputs, train=False)["params"]["embedding"].unbox()

  return quick_jit(first)(jax.random.key(0))


def often(chosen, values):
  """Parameters of a test; those that are not `chosen` are left to `make test-all`."""
  cases = [value if isinstance(value, tuple) else (value,) for value in values]
  return [
    pytest.param(*case, marks=() if value in chosen else pytest.mark.every_variant)
    for case, value in zip(cases, values, strict=True)
  ]


def at_first(model, keys, *inputs, **kwargs):
  """`(logits, Aux)` of a model whose weights are drawn on the spot; `keys` as of `init`."""
  variables = model.init(keys, *inputs, **kwargs)
  return model.apply(variables, *inputs, rngs=keys if isinstance(keys, dict) else None, **kwargs)


def write_corpus(directory: pathlib.Path) -> pathlib.Path:
  """A folder of text files, the same each time."""
  directory.mkdir(parents=True, exist_ok=True)
  draw = random.Random(0)
  for i in range(40):
    (directory / f"{i:02}.txt").write_text(" ".join(draw.choices(WORDS, k=60)) + "\n")
  return directory


def overrides(directory: pathlib.Path, **changes) -> dict:
  """`OVERRIDES` on a corpus under `directory`, with changes (`__` stands for the dot)."""
  corpus = write_corpus(directory / "corpus")
  paths = {"data.sources": (f"text:{corpus}/*.txt",), "data.cache_dir": str(directory / "cache")}
  return OVERRIDES | paths | {key.replace("__", "."): value for key, value in changes.items()}


def flags(directory: pathlib.Path, **changes) -> list[str]:
  return [f"--config.{key}={value}" for key, value in overrides(directory, **changes).items()]


def config(directory: pathlib.Path, **changes):
  """The ConfigDict that those flags make of configs/base.py."""
  from configs import base

  c = base.get_config()
  c.update_from_flattened_dict(overrides(directory, **changes))
  return c


def shrink(c, directory: pathlib.Path):
  """A paper's config, whatever its size, at `OVERRIDES`' size: architecture and routing stay, the
  numbers go down.

  Four layers a stack, which is as many as the first layer with experts needs in each paper; at most
  16 experts.
  """
  from configs import shared

  c = shared.desk(c)
  m, e = c.model, c.model.moe
  m.lstm_units = 16 * m.lstm_units // m.d_model
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
  """The options of exactly these losses, each with the weight 1."""
  return LossOptions(**{f"{name}_loss": float(name in names) for name in LOSSES}, **keys)


def moe_fields(**keys):
  """Keys of `model.moe` as the fields of a `MoeLayer` that hold them; other fields as given."""
  fields = {}
  sections = {"gate": GateOptions, "groups": GroupOptions, "capacity": CapacityOptions}
  for name, section in sections.items():
    own = {key: keys.pop(key) for key in options.keys(section) if key in keys}
    if own:
      fields[name] = section(**own)
  return fields | keys
