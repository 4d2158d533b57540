"""What the papers' configs share: sizes, training recipes, and the size for a desk.

You bring the tokenizer as a file: `--config.data.tokenizer=sentencepiece:FILE` or `hf:FILE`, or you
use `bytes`. C4 stands in where the data of a paper are not public. The tutorial
docs/tutorials/c4_from_zero.md shows how to make a tokenizer and how to prepare C4.
"""

from configs import base, quickstart
from moe_jax import assembly
from moe_jax.assembly.experts import experts_a_token
from moe_jax.errors import choose
from moe_jax.layers.zero_experts import WITHOUT_FFN


def paper_scale(preset, sizes):
  """Returns the base config with the routing and the sizes of a paper.

  Args:
    preset: A name of `assembly.PRESETS`.
    sizes: Dotted key -> value. If it does not name them, the number of key-value heads is that of
      query heads, the experts' width is that of the dense FFN, and the numbers of experts are those
      of the preset.
  """
  c = base.get_config()
  assembly.use_preset(c, preset)
  c.model.dtype, c.model.remat = "bfloat16", "full"
  # Families without attention do not name heads, and nobody reads theirs.
  heads = c.model.num_kv_heads
  same = {
    "model.num_kv_heads": sizes.get("model.num_heads", heads),
    "model.moe.d_ff": sizes["model.d_ff"],
  }
  c.update_from_flattened_dict(same | sizes)
  c.model.moe.dispatcher.name = (
    "ragged_all_to_all" if c.model.moe.capacity_factor is None else "all_to_all"
  )
  c.train.log_every, c.train.eval_every, c.train.checkpoint_every = 100, 5000, 1000
  c.data.pipeline = "stream"
  c.data.sources, c.data.validation_split = ("tfds:c4/en:3.0.1",), "validation"
  return c


# What a keyword of `size` sets.
SIZES = {
  "layers": "model.num_layers",
  "width": "model.d_model",
  "heads": "model.num_heads",
  "ffn": "model.d_ff",
  "vocabulary": "model.vocab_size",
  "expert_width": "model.moe.d_ff",
  "experts": "model.moe.num_experts",
  "num_shared_experts": "model.moe.num_shared_experts",
  "first": "model.moe.first",
  "learning_rate": "optimizer.learning_rate",
  "steps": "train.steps",
  "parameters": "paper.parameters",
  "activated": "paper.activated",
  "note": "paper.note",
  "head_dim": "model.head_dim",
  "batch_size": "train.batch_size",
  "group_size": "model.moe.group_size",
  "remat": "model.remat",
  "experts_a_token": "model.moe.router.noisy_top_k.k",
  "lstm_units": "model.lstm_units",
  "dropout": "model.dropout",
  "without_embedding": "paper.without_embedding",
  "operations": "paper.operations",
  "extra_ffn": "model.moe.extra_ffn",
  "group_rows": "model.moe.group_rows",
  "activation": "model.activation",
  "tied_embeddings": "model.tied_embeddings",
  # configs/lstm_moe.py makes keys of these.
  "gates": "gates",
  "groups": "groups",
  "gpus": "gpus",
}


def size(**values):
  """Returns sizes by their dotted keys; the keywords are those of `SIZES`.

  A table of a paper reads well as a list of such calls, one for each row.
  """
  return {choose("size", name, SIZES): value for name, value in values.items()}


def variant(name, variants):
  """Returns the sizes of a variant, dotted key -> value.

  Those of "desk" are the sizes of the first variant, which `desk` then shrinks.

  Args:
    name: What follows the colon in --config=configs/FAMILY.py:NAME.
    variants: Name -> sizes.

  Raises:
    ConfigError: There is no such variant.
  """
  known = {**variants, "desk": next(iter(variants.values()))}
  return dict(choose("config", name, known))


def t5(c, sequences, steps, encoder_len=512, seq_len=114):
  """Makes a config the T5 1.1 encoder-decoder, with its training.

  It has RMSNorm, no scale on queries or embeddings, and one table of relative biases a stack. It is
  trained by Adafactor, with 1e-4 of the output softmax's log^2 Z. The papers do not mention
  that weight; it is the default of Mesh-TensorFlow's T5, of T5X, and of flaxformer's configurations
  of mixtures of experts, among them those of Switch and ST-MoE. A row of 512 tokens, 15% of which
  are masked in spans of 3, has 114 tokens to restore.
  """
  c.model.family = "encoder_decoder"
  c.model.position, c.model.query_scale, c.model.embed_scale = "relative", 1.0, False
  c.model.relative_shared = True
  c.train.output_z_loss = 1e-4
  adafactor(c)
  c.data.tokenizer, c.data.objective = "sentencepiece:tokenizer.model", "span_corruption"
  c.data.encoder_len, c.data.seq_len = encoder_len, seq_len
  c.train.batch_size, c.train.steps = sequences, steps


def open_decoder(c, norm_eps):
  """Gives a config what all open decoders share.

  They have an output projection of its own and embeddings that nothing multiplies, which start with
  standard deviation 1/sqrt(d_model), near the 0.02 of most released code; see `LanguageModel`.

  Args:
    c: The config to change.
    norm_eps: `rms_norm_eps` of the released configuration.
  """
  c.model.tied_embeddings, c.model.embed_scale, c.model.norm_eps = False, False, norm_eps


def adafactor(c):
  """Sets Adafactor without weight decay or global clipping (T5, GShard, GLaM).

  The learning rate is 0.01 for 10,000 steps and then 1/sqrt(step).
  """
  o = c.optimizer
  o.name, o.schedule, o.learning_rate, o.warmup_steps = "adafactor", "flat_rsqrt", 0.01, 10_000
  o.weight_decay = o.clip_norm = 0.0


def adamw(c, learning_rate, warmup_steps, schedule="cosine", **keys):
  """Sets AdamW with b2 0.95, decay 0.1 and clipping at 1, as in all open models here."""
  c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.schedule = (
    learning_rate,
    warmup_steps,
    schedule,
  )
  c.optimizer.update(keys)
  c.data.tokenizer = "hf:tokenizer.json"


def batch(c, sequences, seq_len, tokens):
  """Sets `sequences` rows of `seq_len` tokens a step, and steps until `tokens` have been read."""
  c.train.batch_size, c.data.seq_len = sequences, seq_len
  c.train.steps = round(tokens / (sequences * seq_len))


def desk(c):
  """Shrinks a config to a desk, where it trains in minutes on a CPU; returns it.

  Architecture and routing stay, with four layers of width 64 in each stack, 16 experts at most, and
  the training of configs/quickstart.py. The experts that a token visits are together as wide as the
  dense FFN. An encoder reads 128 tokens, and its decoder as many as at the paper's scale in
  proportion.
  """
  m, e, quick = c.model, c.model.moe, quickstart.get_config()
  m.num_kv_heads = max(quick.model.num_heads * m.num_kv_heads // m.num_heads, 1)
  for key in ("vocab_size", "target_vocab_size", "num_layers", "num_heads", "dtype", "remat"):
    m[key] = quick.model[key]
  m.lstm_units = 64 * m.lstm_units // m.d_model
  m.rotary_dim = 16 * m.rotary_dim // m.head_dim
  m.d_model, m.d_ff, m.head_dim = 64, 192, 16
  m.dropout = 0.0
  m.latent.update(
    {
      "kv_rank": 32,
      "query_rank": 48 if m.latent.query_rank else 0,
      "nope_dim": 32,
      "rope_dim": 16,
      "value_dim": 32,
    }
  )
  e.router.hierarchical.groups = min(e.router.hierarchical.groups, 4)
  for name in WITHOUT_FFN:
    e[name] = min(e[name], 16 * e[name] // max(e.num_experts, 1))
  e.num_experts, e.group_size, e.group_rows = min(e.num_experts, 16), 0, 1
  e.dispatcher = quick.model.moe.dispatcher
  encoder_len, seq_len, length = c.data.encoder_len, c.data.seq_len, quick.data.seq_len
  c.data.update(
    {
      key: value
      for key, value in quick.data.items()
      if not key.startswith(("objective", "noise_density", "mean_span"))
    }
  )
  if c.data.objective == "span_corruption":
    c.data.encoder_len, c.data.seq_len = length, -(-length * seq_len // encoder_len)
  c.optimizer, c.train = quick.optimizer, quick.train
  if e.num_experts:
    e.d_ff = round(m.d_ff / (experts_a_token(m, c.data.seq_len) + e.num_shared_experts))
  c.paper.update({key: 0.0 for key, value in c.paper.items() if isinstance(value, float)})
  c.paper.note = "this size is no paper's"
  return c
