"""Whole models: token ids in, logits and Aux out."""

from moe_jax.models.decoder import LAYER_REDUCE, REMAT, Decoder, update_router_state
from moe_jax.models.pattern import moe_layers

__all__ = ["LAYER_REDUCE", "REMAT", "Decoder", "moe_layers", "update_router_state"]
