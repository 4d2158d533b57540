"""The parameters and FLOPs of a config agree with values that are computed by hand."""

import pytest
from changed import config

from moe_jax import accounts

pytestmark = pytest.mark.unit


R = "model.moe.router"


def test_parameters_and_flops_by_hand():
  # The model has D=8, 2 heads of 4, a gated FFN of F=16, V=10 and 2 layers. The second layer has 4
  # experts of F=6 with top-2 routing, and one shared expert. By hand:
  #   attention 4*8*8 = 256 and 2 norms of 8 per layer    2 * 272 = 544
  #   dense FFN 3*8*16 = 384; an expert 3*8*6 = 144; router 32; shared expert 144
  #   final norm 8; embedding 80
  #   total                        544 + 384 + 4*144 + 32 + 144 + 8 + 80 = 1768
  #   activated                    1768 - 2*144 = 1480
  #   weights in matrix products   1480 - 5 norms of 8 = 1440
  #   attention over L=16          4 * 2 layers * 16 * 8 = 1024
  # Catches norms that count as matrix products, shared experts that count as routed ones, and an
  # embedding that counts twice.
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


def test_experts_without_an_ffn_by_hand():
  # The model of 8 features, one layer, 4 experts of F=6 (an expert 3*8*6 = 144) and top-6 routing
  # over 2 zero, 1 copy and 3 constant experts besides. A constant expert has a vector of 8 and a
  # matrix of 8 x 2, and all 6 have a column of the router:
  #   router 8*4 and 8*6 + 3 * (8 + 16)    152
  # Catches parameters that are not the router's, and 6 experts of which 4 have an FFN as 1.5 times
  # all experts.
  sizes = {
    "model.d_model": 8,
    "model.num_layers": 1,
    "model.moe.first": 0,
    "model.moe.num_experts": 4,
    "model.moe.d_ff": 6,
    f"{R}.top_k.k": 6,
    "data.seq_len": 16,
  }
  free = {"zero_experts": 2, "copy_experts": 1, "constant_experts": 3}
  c = config(sizes | {f"model.moe.{name}": count for name, count in free.items()})
  kinds = accounts.parameters_by_kind(c, 10)
  assert (kinds["experts"], kinds["router"]) == (576, 152)
  total, activated = accounts.parameter_counts(c, 10)
  assert total == activated == sum(kinds.values())


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
# The weights of queries and output, of keys and values, of the FFN, and of the tied embedding.
MATRICES = 2 * 8 * 8 + 2 * 8 * 4 + 2 * 8 * 16 + 10 * 8


def test_vectors_are_no_matmuls():
  # Catches biases and relative positions that count 2 FLOPs per value, or that count as parameters
  # of another kind.
  vectors = config(
    DENSE | BIASES | {"model.qkv_bias": True, "model.qk_norm": True, "model.ffn_bias": "additive"}
  )
  assert accounts.flops_per_token(vectors, 10) == 2 * MATRICES + 4 * 16 * 8
  # There are biases of 8 + 4 + 4 for queries, keys and values and of 16 in the FFN, norms of 3 * 8
  # and 8 + 4, and a relative bias of 2 heads x 8 buckets.
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
  # Catches scores that count although they are outside the window, and a window that is longer than
  # the row.
  windows = [
    accounts.flops_per_token(config(DENSE | {"model.sliding_window": w}), 10) for w in (0, 6, 99)
  ]
  assert windows == [2 * MATRICES + 4 * 8 * seen for seen in (16, 6, 16)]
  # Of three layers, the second one sees all 16.
  changes = {"model.num_layers": 3, "model.sliding_window": 6, "model.global_every": 2}
  layers = accounts.flops_per_token(config(DENSE | changes), 10)
  assert layers == 2 * (3 * MATRICES - 2 * 80) + 4 * 8 * (6 + 16 + 6)


def test_flops_of_latent_attention():
  # Scores have 4 + 2 features and values have 3, which makes 2 heads * 16 keys * 2 * 9. Catches the
  # use of head_dim.
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
  # There are two blocks with these sublayers:
  #   attention with 2 heads of 4 at D=8, which has 4*8*8 = 256 weights;
  #   4 experts of F=6 at width 4, with 2*4*6 = 48 each, of which a token activates 2 (top-2);
  #     2*8*4 = 64 to and from that width, and a router of 16;
  #   attention as before;
  #   4 experts of F=5 at D=8, with 80 each, of which a capacity of 1 activates one; a router of 32.
  # A block has norms of 4*8, and there is a final norm of 8. Catches the share of one gate that is
  # used for all sublayers, or that of a sublayer outside of the scan for one inside, and the
  # config's heads in place of the sublayer's.
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
    # 2 FLOPs, 4 layers, keys and values of 2 heads of 4, and 16 positions.
    attention = 2 * 4 * 2 * 4 * 2 * 16
    assert accounts.flops_per_token(c, 10) == 2 * (rest - 8 - 64 + 2 * (2 * 48 + 80)) + attention
    assert accounts.parameters_by_kind(c, 10)["widths"] == 2 * 64


def test_flops_of_an_encoder_decoder():
  # There are 32 positions of the encoder for 16 of the decoder. The encoder therefore counts twice
  # per token, and so do the keys and values of cross-attention (2 * 8 * 4). Catches an encoder that
  # does not count, and an embedding of targets that counts although it is only looked up.
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
  # Catches shapes that are cached by the identity of a config and not by its content.
  c = config(DENSE)
  before = accounts.parameter_counts(c, 10)[0]
  c.model.d_ff += 1
  assert (
    accounts.parameter_counts(c, 10)[0] == before + 2 * 8
    and accounts.parameter_counts(c, 12)[0] == before + 4 * 8
  )


def test_a_scanned_model_has_the_same_counts():
  # Catches weights of experts that are not recognised behind a leading axis of layers.
  counts = [
    accounts.parameter_counts(config({"model.scan_layers": scan}), 264) for scan in (True, False)
  ]
  assert counts[0] == counts[1]
