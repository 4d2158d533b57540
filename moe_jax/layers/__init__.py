"""Thin Linen modules: they own the parameters, call routing, dispatch and experts, and return (y,
Aux)."""

from moe_jax.layers.attention import POSITIONS, Attention, rope
from moe_jax.layers.aux import Aux, LayerContext, LayerRouting, Microbatch, concatenate, stack
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.gate import NETWORKS
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.lstm import Lstm
from moe_jax.layers.moe import MoeLayer
from moe_jax.layers.moe_losses import LOSSES, LossOptions, load_without_noise
from moe_jax.layers.norms import NORMS, LayerNorm, RmsNorm
from moe_jax.layers.soft_moe import SoftMoeLayer

__all__ = [
  "LOSSES",
  "NETWORKS",
  "NORMS",
  "POSITIONS",
  "Attention",
  "Aux",
  "DenseFfn",
  "LatentAttention",
  "LayerContext",
  "LayerNorm",
  "LayerRouting",
  "LossOptions",
  "Lstm",
  "Microbatch",
  "MoeLayer",
  "RmsNorm",
  "SoftMoeLayer",
  "concatenate",
  "load_without_noise",
  "rope",
  "stack",
]
