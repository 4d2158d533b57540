"""Builds models, layers and routers from a config, applies presets, and validates configs.

Nothing outside this package, `accounts`, `interop` and `surgery` reads the section `model` of a
config.
"""

from moe_jax.assembly.bind import bind
from moe_jax.assembly.experts import (
  balance,
  check_decoding,
  divided_experts,
  loss_weights,
  names_of_layers_with_experts,
)
from moe_jax.assembly.models import (
  FAMILIES,
  abstract_variables,
  fixed_vocab_size,
  model,
  vocab_size,
)
from moe_jax.assembly.presets import PRESETS, use_preset
from moe_jax.assembly.validate import validate

__all__ = [
  "FAMILIES",
  "PRESETS",
  "abstract_variables",
  "balance",
  "bind",
  "check_decoding",
  "divided_experts",
  "fixed_vocab_size",
  "loss_weights",
  "model",
  "names_of_layers_with_experts",
  "use_preset",
  "validate",
  "vocab_size",
]
