"""Configures GShard (Lepikhin et al. 2020, arXiv 2006.16668), Tables 1 and 3: an encoder-decoder.

  python -m moe_jax.train --config=configs/gshard.py:600b --workdir=runs/gshard
  python -m moe_jax.train --config=configs/gshard.py:desk --workdir=runs/gshard_desk

Every other layer has experts. The paper counts the layers of both stacks together. A group is the
set of tokens that one core holds. The sizes in the paper's model names are 3 to 7% below the
parameter counts, as if they were binary billions. Training is in float32; the 1T model, which ran
in bfloat16, is left out of the paper's results.

Open:
- the positions: relative here, with one table per layer, as in the authors' later code (Lingvo's
  gshard_builder);
- the embeddings: as in T5 and Lingvo, with standard deviation 1 and the logits of tied embeddings
  divided by sqrt(d_model);
- the epsilon of the norms;
- label smoothing and a z-loss of the output, which Lingvo has and the paper does not mention; we
  use neither;
- the length of a row;
- the data, which are 13B translation pairs from 100 languages. Instead, the decoder continues the
  text that the encoder reads, from Wikipedia in twelve of these languages.
"""

from configs import shared

VARIANTS = {
  "600b": shared.size(
    experts=2048, layers=18, batch_size=4096, group_size=2048, remat="full", parameters=600e9
  ),
  "200b": shared.size(
    experts=2048, layers=6, batch_size=4096, group_size=2048, remat="none", parameters=200e9
  ),
  "150b": shared.size(
    experts=512, layers=18, batch_size=1024, group_size=2048, remat="full", parameters=150e9
  ),
  "50b": shared.size(
    experts=512, layers=6, batch_size=1024, group_size=2048, remat="none", parameters=50e9
  ),
  "37b": shared.size(
    experts=128, layers=18, batch_size=1024, group_size=8192, remat="full", parameters=37e9
  ),
  "12_5b": shared.size(
    experts=128, layers=6, batch_size=1024, group_size=8192, remat="none", parameters=12.5e9
  ),
  "1t": shared.size(
    experts=2048, layers=30, batch_size=4096, group_size=2048, remat="full", parameters=1e12
  ),
}
LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "ja", "ko", "pt", "ru", "tr", "zh-cn")


def get_config(variant="600b"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
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
    | shared.variant(variant, VARIANTS),
  )
  c.paper.name, c.paper.note = "GShard", "the paper may count in binary billions, 2^30"
  c.paper.arxiv = "2006.16668"
  shared.t5(
    c, c.train.batch_size, round(1e12 / (c.train.batch_size * 1024)), encoder_len=1024, seq_len=1024
  )
  # A single masked span, the second half of a row, makes the decoder continue the encoder's text.
  c.data.noise_density, c.data.mean_span = 0.5, 1024.0
  c.model.query_scale, c.model.relative_shared, c.train.output_z_loss = 0.0, False, 0.0
  c.model.moe.first, c.model.moe.every = 1, 2
  c.model.activation, c.model.dropout, c.model.dtype = (
    "relu",
    0.1,
    "bfloat16" if variant == "1t" else "float32",
  )
  c.data.sources = tuple(f"tfds:wiki40b/{language}:1.3.0" for language in LANGUAGES)
  return shared.desk(c) if variant == "desk" else c
