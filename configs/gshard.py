"""GShard (Lepikhin et al. 2020, arXiv 2006.16668), Tables 1 and 3: an encoder-decoder, experts in
every other layer.

  python -m moe_jax.train --config=configs/gshard.py:600b --workdir=runs/gshard
  python -m moe_jax.train --config=configs/gshard.py:desk --workdir=runs/gshard_desk

The paper counts the layers of both stacks together. Groups are what one core holds; its names are 3
to 7% below the count, as if in binary billions. Float32; the 1T model, which ran in bfloat16, is
left out of its results. Open: the positions (relative here, a table a layer, as in the authors'
later code, Lingvo's gshard_builder); embeddings (T5's and Lingvo's: standard deviation 1, logits of
the tied ones divided by sqrt(d_model)); the epsilon of the norms; label smoothing and a z-loss of
the output, which Lingvo has and the paper does not mention: neither is here; the length of a row;
the data, 13B translation pairs from 100 languages, in whose place the decoder continues what the
encoder reads of Wikipedia in twelve of them.
"""

from configs import shared

COLUMNS = (
  "model.moe.num_experts",
  "model.num_layers",
  "train.batch_size",
  "model.moe.group_size",
  "model.remat",
  "paper.parameters",
)
VARIANTS = {  # experts, layers of each stack, sequences of 1024, tokens a core, recomputed, claim
  "600b": (2048, 18, 4096, 2048, "full", 600e9),
  "200b": (2048, 6, 4096, 2048, "none", 200e9),
  "150b": (512, 18, 1024, 2048, "full", 150e9),
  "50b": (512, 6, 1024, 2048, "none", 50e9),
  "37b": (128, 18, 1024, 8192, "full", 37e9),
  "12_5b": (128, 6, 1024, 8192, "none", 12.5e9),
  "1t": (2048, 30, 4096, 2048, "full", 1e12),
}
LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "ja", "ko", "pt", "ru", "tr", "zh-cn")


def get_config(variant="600b"):
  c = shared.paper_scale(
    "gshard",
    {
      "model.d_model": 1024,
      "model.d_ff": 8192,
      "model.num_heads": 16,
      "model.head_dim": 128,
      "model.vocab_size": 64_000,
      "model.target_vocab_size": 32_000,
    }
    | shared.variant(variant, VARIANTS, COLUMNS),
  )
  c.paper.name, c.paper.note = "GShard", "the paper may count in binary billions, 2^30"
  shared.t5(
    c, c.train.batch_size, round(1e12 / (c.train.batch_size * 1024)), encoder_len=1024, seq_len=1024
  )
  c.data.noise_density, c.data.mean_span = 0.5, 1024.0  # one span: the second half of a row
  c.model.query_scale, c.model.relative_shared, c.train.output_z_loss = 0.0, False, 0.0
  c.model.moe.first, c.model.moe.every = 1, 2
  c.model.activation, c.model.dropout, c.model.dtype = (
    "relu",
    0.1,
    "bfloat16" if variant == "1t" else "float32",
  )
  c.data.sources = tuple(f"tfds:wiki40b/{language}:1.3.0" for language in LANGUAGES)
  return shared.desk(c) if variant == "desk" else c
