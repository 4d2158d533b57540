"""Parameters and FLOPs of a config."""

import pytest
from changed import config

from moe_jax import accounts

pytestmark = pytest.mark.unit


R = "model.moe.router"


def test_parameters_and_flops_by_hand():
  # D=8, 2 heads of 4, F=16 gated, V=10, 2 layers of which the second has 4 experts of F=6, top-2,
  # one shared expert. attention 4*8*8 = 256 and 2 norms of 8 a layer: 2 * 272 = 544; dense FFN
  # 3*8*16 = 384; expert 3*8*6 = 144; router 32; shared 144; final norm 8; embedding 80. Total 544 +
  # 384 + 4*144 + 32 + 144 + 8 + 80 = 1768; activated 1768 - 2*144 = 1480. Weights in matmuls: 1480
  # less 5 norms of 8 = 1440; attention of L=16: 4 * 2 layers * 16 * 8 = 1024. Catches: norms
  # counted as matmuls, shared experts as routed ones, an embedding counted twice.
  sizes = {
    "model.d_model": 8,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 4,
    "model.d_ff": 16,
    "model.moe.num_experts": 4,
    "model.moe.d_ff": 6,
    "model.moe.num_shared_experts": 1,
    "data.seq_len": 16,
  }
  assert accounts.parameter_counts(config(sizes), 10) == (1768, 1480)
  assert accounts.flops_per_token(config(sizes), 10) == 2 * 1440 + 1024
  untied = config(sizes | {"model.tied_embeddings": False})
  assert accounts.parameter_counts(untied, 10) == (1848, 1560)
  assert accounts.flops_per_token(untied, 10) == 2 * 1440 + 1024
  ec = config(sizes | {f"{R}.name": "expert_choice", f"{R}.expert_choice.capacity_factor": 1.0})
  assert accounts.parameter_counts(ec, 10) == (1768, 1480 - 144)
  assert accounts.parameters_by_kind(config(sizes), 10) == {
    "embedding": 80,
    "attention": 512,
    "recurrence": 0,
    "dense FFN": 384 + 144,
    "experts": 576,
    "router": 32,
    "widths": 0,
    "norms": 40,
    "relative bias": 0,
  }


BIASES = {
  "model.position": "relative",
  "model.relative_buckets": 8,
  "model.relative_max_distance": 16,
}
DENSE = {
  "model.d_model": 8,
  "model.num_layers": 1,
  "model.num_heads": 2,
  "model.num_kv_heads": 1,
  "model.head_dim": 4,
  "model.d_ff": 16,
  "model.moe.num_experts": 0,
  "model.activation": "relu",
  "data.seq_len": 16,
}
MATRICES = (
  2 * 8 * 8 + 2 * 8 * 4 + 2 * 8 * 16 + 10 * 8
)  # queries and output, keys and values, FFN, tied embedding


def test_vectors_are_no_matmuls():
  # Catches: biases and looked-up relative positions that count 2 FLOPs a value, or as another
  # kind's parameters.
  vectors = config(
    DENSE | BIASES | {"model.qkv_bias": True, "model.qk_norm": True, "model.ffn_bias": "additive"}
  )
  assert accounts.flops_per_token(vectors, 10) == 2 * MATRICES + 4 * 16 * 8
  # Biases of 8 + 4 + 4 on q, k, v and of 16 in the FFN; norms of 3 * 8 and 8 + 4; a bias of 2 heads
  # x 8 buckets.
  assert accounts.parameters_by_kind(vectors, 10) == {
    "embedding": 80,
    "attention": 192 + 16,
    "recurrence": 0,
    "dense FFN": 256 + 16,
    "experts": 0,
    "router": 0,
    "widths": 0,
    "norms": 36,
    "relative bias": 16,
  }


def test_flops_of_a_window():
  # Catches: scores counted that the window cuts off; a window longer than the row.
  windows = [
    accounts.flops_per_token(config(DENSE | {"model.sliding_window": w}), 10) for w in (0, 6, 99)
  ]
  assert windows == [2 * MATRICES + 4 * 8 * seen for seen in (16, 6, 16)]


def test_flops_of_latent_attention():
  # Scores over 4 + 2 features, averages of values of 3: 2 heads * 16 keys * 2 * 9. Catches:
  # head_dim read.
  latent = {
    f"model.latent.{key}": value
    for key, value in {
      "kv_rank": 5,
      "query_rank": 0,
      "nope_dim": 4,
      "rope_dim": 2,
      "value_dim": 3,
    }.items()
  }
  c = config(DENSE | {"model.attention": "latent"} | latent)
  matrices = 8 * 2 * 6 + 8 * (5 + 2) + 5 * 2 * (4 + 3) + 2 * 3 * 8 + 2 * 8 * 16 + 80
  assert accounts.flops_per_token(c, 10) == 2 * matrices + 2 * 2 * 16 * 9
  assert accounts.parameters_by_kind(c, 10)["norms"] == 3 * 8 + 5


def test_a_brainformer_by_hand():
  # Twice: attention of 2 heads of 4 at D=8 (4*8*8 = 256); experts of F=6 at width 4 (2 matrices:
  # 2*4*6 = 48), of which top-2 meets 2 of 4, with 2*8*4 = 64 to and from that width and a router of
  # 16; attention; experts of F=5 at D=8 (80), of which a capacity of 1 meets one, with a router of
  # 32. Norms: 4*8 a block and 8. Catches: the share of one gate taken for all sublayers, or of the
  # first stretch's sublayer for the second's; heads of the config counted in place of a sublayer's.
  sizes = {
    "model.family": "brainformer",
    "model.num_layers": 2,
    "model.d_model": 8,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.head_dim": 4,
    "model.activation": "relu",
    "model.moe.num_experts": 4,
    "data.seq_len": 16,
    "model.moe.allow_noncausal_routing": True,
    "model.block": (
      "attention:heads=2",
      "moe:width=4,hidden=6,gate=top_2",
      "attention:heads=2",
      "moe:hidden=5,gate=expert_choice,capacity=1",
    ),
  }
  for scan in (True, False):
    c = config(sizes | {"model.scan_layers": scan})
    rest = 80 + 8 + 2 * (512 + 64 + 16 + 32 + 32)
    assert accounts.parameter_counts(c, 10) == (rest + 2 * 4 * (48 + 80), rest + 2 * (2 * 48 + 80))
    attention = (
      2 * 4 * 2 * 4 * 2 * 16
    )  # 2 FLOPs, 4 layers, keys and values of 2 heads of 4, 16 positions
    assert accounts.flops_per_token(c, 10) == 2 * (rest - 8 - 64 + 2 * (2 * 48 + 80)) + attention
    assert accounts.parameters_by_kind(c, 10)["widths"] == 2 * 64


def test_flops_of_an_encoder_decoder():
  # 32 positions of the source for 16 of the target: the encoder counts twice a token, and so do the
  # cross-attention's keys and values (2 * 8 * 4). Catches: an encoder that is free, a target's
  # embedding that is looked up counted.
  both = (
    DENSE
    | BIASES
    | {"model.family": "encoder_decoder", "model.num_encoder_layers": 2, "data.encoder_len": 32}
  )
  layer = MATRICES - 80
  cross, source = 2 * 8 * 8, 2 * 8 * 4
  encoder = 2 * (2 * layer + 4 * 32 * 8) * 2
  decoder = 2 * (layer + cross + 2 * source) + 4 * (16 + 32) * 8
  assert accounts.flops_per_token(config(both), 10) == encoder + decoder + 2 * 80
  assert (
    accounts.flops_per_token(config(both | {"model.target_vocab_size": 12}), 10)
    == encoder + decoder + 2 * 12 * 8
  )


def test_a_changed_config_is_counted_anew():
  # Catches: shapes that are remembered for a config object and not for what is in it.
  c = config(DENSE)
  before = accounts.parameter_counts(c, 10)[0]
  c.model.d_ff += 1
  assert (
    accounts.parameter_counts(c, 10)[0] == before + 2 * 8
    and accounts.parameter_counts(c, 12)[0] == before + 4 * 8
  )


def test_a_scanned_model_has_the_same_counts():
  # Catches: leading layer axes that hide an expert's weights.
  counts = [
    accounts.parameter_counts(config({"model.scan_layers": scan}), 264) for scan in (True, False)
  ]
  assert counts[0] == counts[1]
