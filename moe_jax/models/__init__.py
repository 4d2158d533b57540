"""Whole models, which map token ids to logits and to an Aux with losses and metrics."""

from moe_jax.models.brainformer import SEARCH_SPACE, Sublayer, sublayer_block
from moe_jax.models.encoder_decoder import EncoderDecoder, Tower
from moe_jax.models.language_model import LanguageModel
from moe_jax.models.lstm import lstm_block
from moe_jax.models.pattern import find_pattern, moe_layers
from moe_jax.models.stack import LAYER_REDUCE, REMAT
from moe_jax.models.transformer import transformer_block
from moe_jax.models.unroll import unroll

__all__ = [
  "LAYER_REDUCE",
  "REMAT",
  "SEARCH_SPACE",
  "EncoderDecoder",
  "LanguageModel",
  "Sublayer",
  "Tower",
  "find_pattern",
  "lstm_block",
  "moe_layers",
  "sublayer_block",
  "transformer_block",
  "unroll",
]
