"""Takes the layers of a model apart, so that decoding reads weights and caches in place."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.language_model import LanguageModel
from moe_jax.models.pattern import find_pattern


def unroll(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
  """Returns a model that computes the same function without `scan_layers`, and its variables.

  A scan copies the weights of each layer out of the stack before it uses them. In training, this is
  little beside the matmuls with many tokens. In decoding it costs more than everything else: of a
  layer's experts, a token needs only K.

  Args:
    model: A `LanguageModel` or an `EncoderDecoder`, with or without `scan_layers`.
    variables: Its variables. NumPy arrays are not copied; JAX arrays are.
  """
  params = dict(variables["params"])
  if isinstance(model, EncoderDecoder):
    apart = model.clone(
      encoder=functools.partial(model.encoder, scan_layers=False),
      decoder=functools.partial(model.decoder, scan_layers=False),
    )
    params["encoder"] = _layers_apart(params["encoder"], model.encoder_experts)
    params["decoder"] = _layers_apart(params["decoder"], model.decoder_experts)
  else:
    assert isinstance(model, LanguageModel), "there are no other kinds of models"
    apart = model.clone(scan_layers=False)
    params = _layers_apart(params, model.has_experts if model.kinds is None else model.kinds)
  return apart, {**variables, "params": params}


def _layers_apart(params: Mapping[str, Any], kinds: Sequence[Hashable]) -> dict[str, Any]:
  """Returns the parameters of a stack with a subtree for each of its layers.

  Args:
    params: The parameters of the module that runs the stack.
    kinds: See `run_layers`.
  """
  apart = {name: value for name, value in params.items() if name != "repeats"}
  pattern = find_pattern(kinds)
  for i, layer in enumerate(pattern.scanned if "repeats" in params else ()):
    repeat, place = divmod(i, pattern.period)
    stacked = params["repeats"][f"layer_{place}"]
    apart[f"layer_{layer}"] = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], stacked)
  return apart
