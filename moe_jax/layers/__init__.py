"""Thin Linen modules, which own the parameters and call routing, dispatch and experts.

Layers that may have experts return (y, Aux): their output, and their losses and metrics.
"""

from moe_jax.layers.attention import Attention, AttentionOptions, rope
from moe_jax.layers.aux import Aux, LayerContext, LayerRouting, Microbatch, concatenate, stack
from moe_jax.layers.cache import Cached
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.gate import NETWORKS, GateOptions
from moe_jax.layers.latent_attention import LatentAttention, LatentOptions
from moe_jax.layers.lstm import Lstm
from moe_jax.layers.moe import GroupOptions, MoeLayer
from moe_jax.layers.moe_losses import LOSSES, LossOptions, RouterFacts, load_without_noise
from moe_jax.layers.norms import NORMS, LayerNorm, RmsNorm
from moe_jax.layers.rope_scaling import RopeOptions
from moe_jax.layers.soft_moe import SoftMoeLayer
from moe_jax.layers.zero_experts import ZeroOptions

__all__ = [
  "LOSSES",
  "NETWORKS",
  "NORMS",
  "Attention",
  "AttentionOptions",
  "Aux",
  "Cached",
  "DenseFfn",
  "GateOptions",
  "GroupOptions",
  "LatentAttention",
  "LatentOptions",
  "LayerContext",
  "LayerNorm",
  "LayerRouting",
  "LossOptions",
  "Lstm",
  "Microbatch",
  "MoeLayer",
  "RmsNorm",
  "RopeOptions",
  "RouterFacts",
  "SoftMoeLayer",
  "ZeroOptions",
  "concatenate",
  "load_without_noise",
  "rope",
  "stack",
]
