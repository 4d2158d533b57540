"""Parameters and FLOPs of a config."""

import pytest
from changed import config

from moe_jax import build

pytestmark = pytest.mark.unit


R = "model.moe.router"


def test_parameters_and_flops_by_hand():
  # D=8, 2 heads of 4, F=16 gated, V=10, 2 layers of which the second has 4 experts of F=6, top-2, one shared expert.
  # attention 4*8*8 = 256 and 2 norms of 8 a layer: 2 * 272 = 544; dense FFN 3*8*16 = 384; expert 3*8*6 = 144;
  # router 32; shared 144; final norm 8; embedding 80.
  # Total 544 + 384 + 4*144 + 32 + 144 + 8 + 80 = 1768; activated 1768 - 2*144 = 1480.
  # Weights in matmuls: 1480 less 5 norms of 8 = 1440; attention of L=16: 4 * 2 layers * 16 * 8 = 1024.
  # Catches: norms counted as matmuls, shared experts as routed ones, an embedding counted twice.
  sizes = {"model.d_model": 8, "model.num_layers": 2, "model.num_heads": 2, "model.num_kv_heads": 2,
           "model.head_dim": 4, "model.d_ff": 16, "model.moe.num_experts": 4, "model.moe.d_ff": 6,
           "model.moe.num_shared_experts": 1, "data.seq_len": 16}
  assert build.parameter_counts(config(sizes), 10) == (1768, 1480)
  assert build.flops_per_token(config(sizes), 10) == 2 * 1440 + 1024
  untied = config(sizes | {"model.tied_embeddings": False})
  assert build.parameter_counts(untied, 10) == (1848, 1560)
  assert build.flops_per_token(untied, 10) == 2 * 1440 + 1024
  ec = config(sizes | {f"{R}.name": "expert_choice", f"{R}.expert_choice.capacity_factor": 1.0})
  assert build.parameter_counts(ec, 10) == (1768, 1480 - 144)


def test_a_scanned_model_has_the_same_counts():
  # Catches: leading layer axes that hide an expert's weights.
  counts = [build.parameter_counts(config({"model.scan_layers": scan}), 264) for scan in (True, False)]
  assert counts[0] == counts[1]
