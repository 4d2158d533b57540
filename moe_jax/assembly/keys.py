"""What each key of a config may hold: one table of bounds for numbers, and the kinds of all other
keys.

Every key of configs/base.py stands in exactly one of `NUMBERS`, `FLAGS`, `TEXTS`, `TUPLES` or in
validate.py's `NAMES`. The options of routers and dispatchers get their types from the functions'
defaults (`bind`), and their bounds here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from moe_jax.errors import ConfigError
from moe_jax.sharding import AXES, CHANGEABLE

# float32 ends at 3.4e38: a larger number leaves no room for a product with what it multiplies
LARGEST = 1e20
SMALLEST = 1e-30  # of what must be positive; float32's smallest normal number is 1.2e-38
INT32 = 2**31 - 1  # Optax and the data's positions count in int32


@dataclasses.dataclass(frozen=True)
class Numbers:
  """Bounds of some keys' numbers.

  Attributes:
    low: the least.
    high: the most; with `below` the first that is too large.
    why: the reason for the bound that is not obvious from the key's meaning.
    keys: dotted; a part `*` stands for any name.
    whole: whether it must be an int; otherwise it may be an int or a float. A bool is neither.
  """

  low: int | float
  high: int | float
  why: str
  keys: tuple[str, ...]
  whole: bool = True
  below: bool = False

  @property
  def words(self) -> str:
    """As in "must be a whole number, at least 1 and at most 1,000"."""

    def show(v):
      return f"{v:,}" if isinstance(v, int) else f"{v:g}"

    least = (
      f"above 0 ({SMALLEST:g} or more)" if self.low == SMALLEST else f"at least {show(self.low)}"
    )
    return (
      f"must be a {'whole ' * self.whole}number, {least} and "
      f"{'below' if self.below else 'at most'} {show(self.high)}"
    )

  def hold(self, value: Any) -> bool:
    """Whether `value` is such a number; NaN and infinities never are."""
    kind = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
    return kind and self.low <= value <= self.high and not (self.below and value == self.high)


_R = "model.moe.router.*"
NUMBERS: tuple[Numbers, ...] = (
  Numbers(
    0,
    2**32 - 1,
    "a key of JAX's generator is made of 32 bits: others would be the same seed under another name",
    ("seed", "data.seed", f"{_R}.seed"),
  ),
  Numbers(
    1,
    1_000,
    "the deepest Transformer published has 1,000 layers (DeepNet, arXiv 2203.00555)",
    ("model.num_layers", "model.moe.every"),
  ),
  Numbers(0, 1_000, "as num_layers", ("model.num_encoder_layers", "model.moe.first")),
  Numbers(
    1,
    2**20,
    "64 times the widest published (Switch-XXL's d_ff is 65,536); a square matrix of it takes 4 TB",
    (
      "model.d_model",
      "model.num_heads",
      "model.num_kv_heads",
      "model.head_dim",
      "model.d_ff",
      "model.moe.d_ff",
      "model.latent.kv_rank",
      "model.latent.nope_dim",
      "model.latent.rope_dim",
      "model.latent.value_dim",
    ),
  ),
  Numbers(0, 2**20, "as d_model", ("model.lstm_units", "model.latent.query_rank")),
  Numbers(
    0,
    2**20,
    "the most published is 1,048,576 (PEER, arXiv 2407.04153)",
    ("model.moe.num_experts", "model.moe.num_shared_experts", "model.moe.soft_slots"),
  ),
  Numbers(
    1,
    2**20,
    "as num_experts",
    (
      "model.moe.devices",
      f"{_R}.k",
      f"{_R}.groups",
      f"{_R}.kept_groups",
      f"{_R}.primary_k",
      f"{_R}.max_experts",
      f"{_R}.choices",
    ),
  ),
  Numbers(
    0,
    2**24,
    "20 times the largest published (793,471 words, Shazeer et al. 2017)",
    ("model.vocab_size", "model.target_vocab_size"),
  ),
  Numbers(
    1,
    2**20,
    "a million tokens a row, a million rows a batch",
    (
      "data.seq_len",
      "data.encoder_len",
      "train.batch_size",
      "train.accumulate_steps",
      "model.moe.group_rows",
      "model.relative_max_distance",
    ),
  ),
  Numbers(0, 2**20, "as seq_len", ("model.sliding_window",)),
  Numbers(4, 2**16, "each bucket has a parameter a head", ("model.relative_buckets",)),
  Numbers(0, INT32, "tokens are counted in int32", ("model.moe.group_size",)),
  Numbers(1, INT32, "slots are counted in int32", ("model.moe.min_capacity",)),
  Numbers(
    1,
    INT32,
    "Optax counts steps in int32",
    ("train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every"),
  ),
  Numbers(
    0,
    INT32,
    "as train.steps",
    (
      "optimizer.warmup_steps",
      "train.eval_batches",
      "train.final_eval_batches",
      "train.guard.max_rollbacks",
      "train.guard.rollback_margin",
    ),
  ),
  Numbers(1, INT32, "as train.steps", ("train.guard.patience",)),
  Numbers(
    16,
    100_000,
    "they are sorted in each step; fewer do not tell what is usual",
    ("train.guard.spike_window",),
  ),
  Numbers(1, 1_000, "each is a copy of the state on disk", ("train.keep_last",)),
  Numbers(0, 1_000, "each is a copy of the state on disk", ("train.keep_best",)),
  Numbers(0, 10**7, "20 years", ("train.max_minutes",), whole=False),
  Numbers(
    0,
    10**6,
    "LZMA and the n-grams hold the text in memory",
    ("report.ladder_megabytes",),
    whole=False,
  ),
  Numbers(0, 1_024, "each is a thread of the operating system", ("data.threads",)),
  Numbers(
    1, 10_000, "they run one after the other in each layer of each step", (f"{_R}.iterations",)
  ),
  Numbers(-1, 2**20, "no machine has a million devices", tuple(f"mesh.{axis}" for axis in AXES)),
  Numbers(
    SMALLEST,
    LARGEST,
    "see LARGEST and SMALLEST",
    (
      "model.moe.routed_scale",
      "optimizer.learning_rate",
      "optimizer.milestone_factor",
      "optimizer.update_clip",
      "optimizer.eps",
      f"{_R}.threshold",
    ),
    whole=False,
  ),
  Numbers(
    0,
    LARGEST,
    "see LARGEST",
    (
      "model.clip_qkv",
      "model.query_scale",
      "model.moe.router_init_scale",
      "model.moe.balance_loss",
      "model.moe.z_loss",
      "model.moe.importance_loss",
      "model.moe.load_loss",
      "model.moe.device_loss",
      "model.moe.communication_loss",
      "model.moe.threshold_loss",
      "model.moe.bias_update_rate",
      "optimizer.weight_decay",
      "optimizer.clip_norm",
      "train.output_z_loss",
      "train.guard.spike_sigmas",
      f"{_R}.noise_floor",
      "paper.parameters",
      "paper.activated",
      "paper.without_embedding",
      "paper.operations",
    ),
    whole=False,
  ),
  Numbers(
    1,
    LARGEST,
    "below 1, distant positions would turn faster than near ones",
    ("model.rope_theta",),
    whole=False,
  ),
  Numbers(
    SMALLEST,
    2**20,
    "from E on every expert has a slot for every token",
    ("model.moe.capacity_factor", "model.moe.eval_capacity_factor", f"{_R}.capacity_factor"),
    whole=False,
  ),
  Numbers(
    1e-6,
    1e6,
    "logits or probabilities are divided by it in float32",
    (f"{_R}.temperature", f"{_R}.entropy"),
    whole=False,
  ),
  Numbers(
    1e-4,
    1,
    "a part of the range of the logits; see the router base",
    (f"{_R}.epsilon",),
    whole=False,
  ),
  Numbers(1, 2**20, "as seq_len", ("data.mean_span",), whole=False),
  Numbers(
    1e-6,
    1,
    "a share of the tokens or of the documents; at least one of them is held out",
    ("data.noise_density", "data.validation_fraction"),
    whole=False,
    below=True,
  ),
  Numbers(
    0,
    1,
    "a probability, a share or a decay rate",
    ("model.dropout", "model.moe.jitter", "optimizer.b1", "optimizer.b2"),
    whole=False,
    below=True,
  ),
  Numbers(
    0,
    1,
    "a share of the peak, or of an even load",
    ("optimizer.final_fraction", "train.guard.starved_share"),
    whole=False,
  ),
  Numbers(
    1e-12,
    0.1,
    "what is squared and averaged is near 1, and published values are 1e-5 and 1e-6",
    ("model.norm_eps",),
    whole=False,
    below=True,
  ),
  Numbers(1e-9, 1, "a share of the steps", ("optimizer.decay_fraction",), whole=False),
)
OPTIONAL = ("model.moe.capacity_factor", "model.moe.eval_capacity_factor")  # may be None

FLAGS = (
  "model.qkv_bias",
  "model.qk_norm",
  "model.relative_shared",
  "model.embed_scale",
  "model.tied_embeddings",
  "model.scan_layers",
  "model.moe.extra_ffn",
  "model.moe.shared_gate",
  "model.moe.allow_noncausal_routing",
  "train.guard.skip_nonfinite",
)
TEXTS = (
  "model.family",
  "model.activation",
  "model.norm",
  "model.dtype",
  "model.remat",
  "model.attention",
  "model.position",
  "model.ffn_bias",
  "model.moe.activation",
  "model.moe.encoder_priority",
  "model.moe.capacity_basis",
  "model.moe.balance_counts",
  "model.moe.balance_over",
  "model.moe.capacity_rounding",
  "model.moe.gate_network",
  "model.moe.jitter_on",
  "model.moe.router_dtype",
  "model.moe.balance_scores",
  "model.moe.importance_of",
  "model.moe.replay_gate",
  "model.moe.layer_reduce",
  "data.pipeline",
  "data.objective",
  "data.tokenizer",
  "data.bos",
  "data.eos",
  "data.cache_dir",
  "data.tfds_dir",
  "data.text_field",
  "data.validation_split",
  "optimizer.name",
  "optimizer.schedule",
  "paper.name",
  "paper.note",
  "report.compare",
)
_POSITIVE = Numbers(0, LARGEST, "see LARGEST", (), whole=False)
# key -> what each entry of its tuple must be (a type or bounds), and the same in words.
TUPLES: Mapping[str, tuple[Any, str]] = {
  "model.block": (str, "must be a string, such as 'attention' or 'moe:gate=top_2'"),
  "data.sources": (str, "must be a string, such as 'embedded:prose'"),
  "data.weights": (_POSITIVE, _POSITIVE.words),
  "optimizer.milestones": (_POSITIVE, _POSITIVE.words),
  "optimizer.freeze": (str, "must be the name of a parameter, such as 'router'"),
  **{
    f"sharding.{axis}": (str, f"must be an axis of the mesh: {', '.join(AXES)}")
    for axis in CHANGEABLE
  },
}
BOUND = ("model.moe.router", "model.moe.dispatcher")  # branches of options, whose keys `bind` knows
_BOUNDS = {key: numbers for numbers in NUMBERS for key in numbers.keys}
KEYS = (*(key for key in _BOUNDS if "*" not in key), *FLAGS, *TEXTS, *TUPLES)


def check_keys(config: Any) -> None:
  """Refuses a config whose keys are not those of configs/base.py, or hold another kind of value.

  Raises:
    ConfigError: a key that there is not, with the nearest that there is; a missing key; a value of
      another type, or a number out of its bounds.
  """
  if not isinstance(config, (ConfigDict, FrozenConfigDict)):
    raise ConfigError("config", config, "must be a ConfigDict, as configs/base.py makes it")
  found = dict(_leaves(config))
  branches = _branches()
  for key, value in found.items():
    if key in branches:
      raise _no_branch(key, value, branches[key])
    if (parent := key.rpartition(".")[0]) in KEYS:
      raise ConfigError(key, value, f"{parent} holds no other keys; leave it out")
    if key not in KEYS and not is_option(key):
      near = difflib.get_close_matches(key, KEYS, 1)
      raise ConfigError(
        key,
        value,
        f"there is no such key; {f'did you mean {near[0]}?' if near else 'leave it out'}",
      )
  for key in KEYS:
    if key not in found:
      raise ConfigError(
        key, None, "is missing; begin a config with `c = base.get_config()` of configs/base.py"
      )
    check_value(key, found[key])
  for branch in BOUND:
    if f"{branch}.name" not in found:
      raise ConfigError(f"{branch}.name", None, "is missing; see configs/base.py")
  for key in filter(is_option, found):
    check_value(key, found[key])


def check_value(key: str, value: Any) -> None:
  """Refuses a value of the wrong type, or a number out of bounds; keys that no table names are not
  looked at."""
  if numbers := bounds(key):
    if not numbers.hold(value) and not (value is None and key in OPTIONAL):
      raise ConfigError(key, value, numbers.words + (", or None" if key in OPTIONAL else ""))
    if (
      not numbers.whole and isinstance(value, int) and abs(value) > INT32
    ):  # JAX would take it for an int32
      raise ConfigError(key, value, f"must be written with a point, as {float(value)!r}")
  elif key in FLAGS and not isinstance(value, bool):
    raise ConfigError(key, value, "must be True or False")
  elif key in TEXTS:
    _check_text(key, value, value, "must be a string")
  elif key in TUPLES:
    kind, words = TUPLES[key]
    if not isinstance(value, (tuple, list)):
      raise ConfigError(
        key, value, "must be a tuple, such as ('a',), or () for none; of each entry: " + words
      )
    for entry in value:
      if kind is str:
        _check_text(key, value, entry, f"{entry!r} in it {words}")
      elif not kind.hold(entry):
        raise ConfigError(key, value, f"{entry!r} in it {words}")
  elif is_option(key) and not isinstance(value, (str, int, float, NoneType)):  # a bool is an int
    # `bind` compares with the option's default, but only where there are experts.
    raise ConfigError(key, value, "must be a name, a number, True or False")


def is_option(key: str) -> bool:
  """Whether a key names a router or dispatcher, or an option of one."""
  return key.startswith(tuple(f"{branch}." for branch in BOUND))


def bounds(key: str) -> Numbers | None:
  """Returns the bounds of the numbers that a key may hold; None where it holds no number, or has no
  bounds."""
  if key in _BOUNDS:
    return _BOUNDS[key]
  if key.startswith(_R.removesuffix("*")):
    return _BOUNDS.get(f"{_R}.{key.rpartition('.')[2]}")
  return None


def _check_text(key: str, whole: Any, text: Any, words: str) -> None:
  if not isinstance(text, str):
    raise ConfigError(key, whole, words)
  if "\0" in text:
    raise ConfigError(
      key, whole, "holds a NUL character, which no name and no path can hold; leave it out"
    )
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ConfigError(
      key, whole, "holds bytes that are no UTF-8 text; use a name or a path that is"
    ) from None


def _no_branch(key: str, value: Any, inside: str) -> ConfigError:
  return ConfigError(
    key, value, f"holds other keys and is no value itself; set one of them, such as {inside}"
  )


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """`(dotted key, value)` of everything that is no branch; of an empty branch itself."""
  for key in config:
    value = config[key]
    if isinstance(value, (Mapping, ConfigDict, FrozenConfigDict)) and len(value):
      yield from _leaves(value, f"{prefix}{key}.")
    elif not (
      isinstance(value, (Mapping, ConfigDict, FrozenConfigDict)) and is_option(f"{prefix}{key}")
    ):
      yield f"{prefix}{key}", value


@functools.cache
def _branches() -> dict[str, str]:
  """Each branch -> a key inside it."""
  found = {branch: f"{branch}.name" for branch in BOUND}
  for key in KEYS:
    parts = key.split(".")
    for n in range(1, len(parts)):
      found.setdefault(".".join(parts[:n]), key)
  return found
