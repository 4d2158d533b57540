"""Configures LSTM, experts, LSTM (Shazeer et al. 2017, arXiv 1701.06538): Tables 7 and 8.

  python -m moe_jax.train --config=configs/lstm_moe.py:moe_256 --workdir=runs/lstm_moe
  python -m moe_jax.train --config=configs/lstm_moe.py:desk --workdir=runs/lstm_moe_desk

Table 7 (1B words) is in the paper's appendix C, Table 8 (100B words) in its appendix D. The
variants of Table 8 begin with `news`. Variants that end in `_h` are hierarchical: a token visits 2
groups of experts, and 2 experts in each.

The tables count parameters without embedding and softmax. With one bias for each gate of each LSTM,
all counts agree with the paper's to the printed digit; the count of MoE-143M agrees only with this
bias. The paper counts only the operations of the gates of the selected groups, while the gates of
all groups are computed here. MoE-1-Deep, whose expert has four hidden layers, is not supported.

Open: the peak learning rate, the length of a row, the dropout in Table 8, and its vocabulary
(100,000 words fit the totals); how embeddings are initialised (here rows have unit variance when
they reach the first LSTM, which has no norm before it); Google News is not public, so C4 replaces
it.

Deviation: a group contains the tokens that one of the paper's GPUs holds, so each device routes and
balances its own tokens; the paper balances the tokens of all GPUs together, as `desk` does. The
softmax is not sampled. Table 8 uses Adafactor instead of Adam without momentum and with factored
second moments.
"""

from configs import shared

GATES = {
  "hierarchical": "hierarchical",
  "flat": "noisy_top_k",
  "wide": "random",
  "none": "noisy_top_k",
}
EMBEDDED = "4,313.9M and two matrices of 793,471 x 1024 make 5.94B"
# What several rows of the paper's table share.
_WORDS = shared.size(
  width=512,
  expert_width=1024,
  groups=0,
  lstm_units=0,
  dropout=0.1,
  gpus=16,
  parameters=0.8e9,
  operations=8.4e6,
)
_WORDS_H = shared.size(
  gates="hierarchical", width=512, expert_width=1024, groups=16, lstm_units=0, dropout=0.2, gpus=16
)
_WIDE_H = shared.size(gates="hierarchical", width=1024, groups=16, gpus=16, parameters=6.0e9)
_NEWS = shared.size(
  width=512,
  expert_width=1024,
  groups=0,
  lstm_units=0,
  dropout=0.0,
  gpus=32,
  parameters=0.1e9,
  operations=8.4e6,
)
_NEWS_H = shared.size(
  gates="hierarchical", width=512, expert_width=1024, lstm_units=0, dropout=0.0, gpus=32
)
VARIANTS = {
  "moe_256": _WORDS
  | shared.size(
    gates="flat", experts=256, without_embedding=272.9e6, parameters=1.1e9, operations=8.6e6
  ),
  "moe_4": _WORDS | shared.size(gates="flat", experts=4, without_embedding=8.4e6),
  "moe_32": _WORDS
  | shared.size(gates="flat", experts=32, without_embedding=37.8e6, parameters=0.9e9),
  "moe_256_h": _WORDS_H
  | shared.size(
    experts=256, dropout=0.1, without_embedding=272.9e6, parameters=1.1e9, operations=8.4e6
  ),
  "moe_1024_h": _WORDS_H
  | shared.size(experts=1024, without_embedding=1079.0e6, parameters=1.9e9, operations=8.5e6),
  "moe_4096_h": _WORDS_H
  | shared.size(experts=4096, without_embedding=4303.4e6, parameters=5.1e9, operations=8.9e6),
  "moe_34m": _WIDE_H
  | shared.size(
    experts=1024,
    expert_width=2048,
    lstm_units=0,
    dropout=0.3,
    without_embedding=4313.9e6,
    operations=33.8e6,
    note=EMBEDDED,
  ),
  "moe_143m": _WIDE_H
  | shared.size(
    experts=256,
    expert_width=8192,
    lstm_units=4096,
    dropout=0.4,
    without_embedding=4371.1e6,
    operations=142.7e6,
  ),
  "moe_1_wide": _WORDS
  | shared.size(gates="wide", experts=1, expert_width=4096, without_embedding=8.4e6),
  "4xlstm_512": _WORDS | shared.size(gates="none", experts=0, without_embedding=8.4e6),
  "lstm_2048_512": _WORDS
  | shared.size(
    gates="none", experts=0, lstm_units=2048, without_embedding=9.4e6, operations=9.4e6
  ),
  "news_32": _NEWS | shared.size(gates="flat", experts=32, without_embedding=37.8e6),
  "news_256_h": _NEWS_H
  | shared.size(
    experts=256, groups=32, without_embedding=272.9e6, parameters=0.4e9, operations=8.4e6
  ),
  "news_1024_h": _NEWS_H
  | shared.size(
    experts=1024, groups=32, without_embedding=1079.0e6, parameters=1.2e9, operations=8.5e6
  ),
  "news_4096_h": _NEWS_H
  | shared.size(
    experts=4096, groups=64, without_embedding=4303.4e6, parameters=4.4e9, operations=8.6e6
  ),
  "news_16384_h": _NEWS_H
  | shared.size(
    experts=16_384, groups=128, without_embedding=17_201.0e6, parameters=17.3e9, operations=8.8e6
  ),
  "news_65536_h": _NEWS_H
  | shared.size(
    experts=65_536,
    groups=256,
    gpus=64,
    without_embedding=68_791.0e6,
    parameters=68.9e9,
    operations=9.2e6,
  ),
  "news_131072_h": _NEWS_H
  | shared.size(
    experts=131_072,
    groups=256,
    gpus=128,
    without_embedding=137_577.6e6,
    parameters=137.7e9,
    operations=9.7e6,
  ),
  "news_4xlstm_512": _NEWS | shared.size(gates="none", experts=0, without_embedding=8.4e6),
}


def get_config(variant="moe_256"):
  """Returns the config of a variant, a key of `VARIANTS` or "desk"."""
  sizes = shared.variant(variant, VARIANTS)
  gates, groups, gpus = (sizes.pop(name) for name in ("gates", "groups", "gpus"))
  news = variant.startswith("news")
  c = shared.paper_scale(
    GATES[gates], sizes | {"model.d_ff": sizes["model.moe.d_ff"] * (1 if gates == "wide" else 4)}
  )
  c.paper.name, c.model.family = "Shazeer et al. 2017", "lstm"
  c.paper.arxiv = "1701.06538"
  c.model.activation, c.model.tied_embeddings = "relu", False
  c.model.dtype, c.model.remat = "float32", "full" if news else "none"
  c.model.vocab_size = 100_000 if news else 793_471
  c.model.moe.first, c.model.moe.every, c.model.moe.dispatcher.name = 0, 2, "ragged_all_to_all"
  c.model.num_layers = {"lstm_2048_512": 1}.get(variant, 4 if gates == "none" else 2)
  c.model.moe.router.hierarchical.groups = groups or c.model.moe.router.hierarchical.groups
  _training(c, news)
  c.model.moe.group_size = c.train.batch_size * c.data.seq_len // gpus
  if variant == "desk":
    c = shared.desk(c)
    c.model.num_layers = 2
    # At this size all tokens of a batch are routed together.
    c.model.moe.group_size = c.train.batch_size * c.data.seq_len
  return c


def _training(c, news):
  """Sets Adam with a warm-up of 1000 steps, after which the rate falls as 1/sqrt(step).

  A batch has 300,000 words for ten epochs or, if `news`, 2.5M words for one epoch.
  """
  if news:
    shared.adafactor(c)
    shared.batch(c, sequences=19_456, seq_len=128, tokens=100e9)
  else:
    shared.batch(c, sequences=2304, seq_len=128, tokens=10 * 829e6)
    c.data.sources, c.data.validation_split = ("tfds:lm1b:1.1.0",), "test"
    c.optimizer.weight_decay, c.optimizer.clip_norm, c.optimizer.b2 = 0.0, 0.0, 0.999
  c.optimizer.schedule, c.optimizer.warmup_steps = "rsqrt", 1000
  c.data.tokenizer = "hf:tokenizer.json"
