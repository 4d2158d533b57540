"""Thin Linen modules: they own the parameters, call routing, dispatch and experts, and return (y, Aux)."""

from moe_jax.layers.attention import Attention, rope
from moe_jax.layers.aux import Aux, LayerContext, concatenate, stack
from moe_jax.layers.ffn import DenseFfn
from moe_jax.layers.moe import LOSSES, MoeLayer
from moe_jax.layers.norms import NORMS, LayerNorm, RmsNorm

__all__ = ["LOSSES", "NORMS", "Attention", "Aux", "DenseFfn", "LayerContext", "LayerNorm", "MoeLayer", "RmsNorm",
           "concatenate", "rope", "stack"]
