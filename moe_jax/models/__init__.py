"""Whole models: token ids in, logits and Aux out."""

from moe_jax.models.brainformer import SEARCH_SPACE, Brainformer, Sublayer
from moe_jax.models.decoder import Decoder, update_router_state
from moe_jax.models.encoder_decoder import EncoderDecoder, Tower
from moe_jax.models.lstm import LstmLm
from moe_jax.models.pattern import find_pattern, moe_layers
from moe_jax.models.stack import LAYER_REDUCE, REMAT

__all__ = [
  "LAYER_REDUCE",
  "REMAT",
  "SEARCH_SPACE",
  "Brainformer",
  "Decoder",
  "EncoderDecoder",
  "LstmLm",
  "Sublayer",
  "Tower",
  "find_pattern",
  "moe_layers",
  "update_router_state",
]
