"""The options of the sections `model` and `model.moe` that describe a whole model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from moe_jax.experts import ACTIVATIONS, FFN_BIASES
from moe_jax.layers import NORMS
from moe_jax.models.stack import LAYER_REDUCE, REMAT
from moe_jax.options import (
  EXPERTS,
  OPTIONAL_WIDTH,
  PROBABILITY,
  ROWS,
  WIDTH,
  Bounds,
  OneOf,
  Options,
  Text,
  option,
)

LAYERS = Bounds(
  1, 1_000, "the deepest Transformer published has 1,000 layers (DeepNet, arXiv 2203.00555)"
)
_OPTIONAL_LAYERS = dataclasses.replace(LAYERS, low=0)
_LAYER = Bounds(0, LAYERS.high - 1, "as LAYERS", whole=True)
_ENTRIES = Bounds(0, 2**24, "20 times the largest published (793,471 words, Shazeer et al. 2017)")
_EPSILON = Bounds(
  1e-12,
  0.1,
  "what is squared and averaged is near 1, and published values are 1e-5 and 1e-6",
  below=True,
)


@dataclasses.dataclass(frozen=True)
class ModelOptions(Options):
  """The section `model` without attention, which has `AttentionOptions`."""

  family: Literal["decoder", "encoder_decoder", "brainformer", "lstm"] = option(
    "decoder", "The kind of model; in an lstm each layer is an LSTM, which experts may follow."
  )
  vocab_size: Annotated[int, _ENTRIES] = option(
    0, "Entries of the embedding; 0 is the tokenizer's size."
  )
  target_vocab_size: Annotated[int, _ENTRIES] = option(
    0, "Entries of a second embedding, for an encoder_decoder's targets (GShard); 0 is none."
  )
  d_model: Annotated[int, WIDTH] = option(128, "Width of the residual stream.")
  num_layers: Annotated[int, LAYERS] = option(
    4, "Layers; of an encoder_decoder, those of the decoder; of a brainformer, stacked blocks."
  )
  num_encoder_layers: Annotated[int, _OPTIONAL_LAYERS] = option(
    0, "Layers of an encoder_decoder's encoder; 0 means as many as num_layers."
  )
  lstm_units: Annotated[int, OPTIONAL_WIDTH] = option(
    0,
    "Units of each LSTM, whose output is projected to d_model unless they are equal; 0 = d_model.",
  )
  block: Annotated[
    tuple[str, ...], Text("must be a string, such as 'attention' or 'moe:gate=top_2'")
  ] = option(
    (),
    "Sublayers of a block of a brainformer: attention, ffn or moe, each with what differs from the "
    "other keys, as in 'attention:width=96,heads=3', 'ffn:hidden=256,activation=relu' or "
    "'moe:gate=top_2,capacity=1'.",
  )
  attention: Literal["grouped_query", "latent"] = option(
    "grouped_query",
    "The kind of attention; latent (DeepSeek-V2) reads num_heads, rope_theta and model.latent.",
  )
  attention_block: Annotated[int, dataclasses.replace(ROWS, low=0)] = option(
    256,
    "Queries whose attention scores exist at the same time, in rows of at least four such blocks; "
    "each block is computed again in the backward pass. 0 = all queries of a row.",
  )
  attention_kernel: Literal["auto", "blocks"] = option(
    "auto",
    "What computes self-attention in rows that have blocks: on TPUs JAX's splash kernel where it "
    "can, and else blocks (auto); or blocks everywhere.",
  )
  d_ff: Annotated[int, WIDTH] = option(512, "Hidden width of the dense FFNs.")
  activation: Annotated[str, OneOf(ACTIVATIONS)] = option(
    "swiglu",
    "Activation of the FFNs; those that end in glu have a gate, which is a third matrix. "
    "clamped_swiglu is gpt-oss's, with limits of 7.",
  )
  ffn_bias: Annotated[str, OneOf(FFN_BIASES)] = option(
    "none", "A vector that is added to, or multiplies (ST-MoE), the hidden units of every FFN."
  )
  mlp_bias: bool = option(
    False, "Additive biases on all products of dense FFNs and shared experts (LLaMA's option)."
  )
  norm: Annotated[str, OneOf(NORMS)] = option(
    "rmsnorm", "The norms; rmsnorm_unscaled has no parameters (an ablation of ST-MoE)."
  )
  norm_eps: Annotated[float, _EPSILON] = option(
    1e-6, "Added to the mean square or the variance in all norms but latent attention's."
  )
  embed_scale: bool = option(
    True, "Whether rows of the embedding are multiplied by sqrt(d_model) on the way in."
  )
  tied_embeddings: bool = option(True, "Whether the output projection is the embedding.")
  logits_chunk: Annotated[int, _ENTRIES] = option(
    8192,
    "Entries of the vocabulary whose logits exist at the same time in training and evaluation, if "
    "there are at least twice as many; the backward pass computes them again. 0 = all entries.",
  )
  dropout: Annotated[float, PROBABILITY] = option(
    0.0, "Probability of dropout on the output of each sublayer."
  )
  dtype: Literal["float32", "bfloat16"] = option(
    "float32", "Dtype of the activations; parameters and routers are always float32."
  )
  scan_layers: bool = option(
    True, "Whether the repeats of the layer pattern are compiled once, as the body of a scan."
  )
  remat: Annotated[str, OneOf(REMAT)] = option(
    "none",
    "What is recomputed in the backward pass: nothing (none), or all but each layer's input (full) "
    "and the outputs of matmuls with weights (dots), the rows that experts receive and return "
    "(exchanges), or these and the experts' pre-activations (experts).",
  )


@dataclasses.dataclass(frozen=True)
class ExpertOptions(Options):
  """The part of the section `model.moe` that says which layers have experts, and how large."""

  num_experts: Annotated[int, EXPERTS] = option(
    8, "Experts of each layer that has some; 0 is a dense model."
  )
  first: Annotated[int, _OPTIONAL_LAYERS] = option(
    1, "The first layer with experts: layer i has some if i >= first and every divides i - first."
  )
  every: Annotated[int, LAYERS] = option(2, "The distance between layers with experts; see first.")
  dense_layers: Annotated[tuple[int, ...], _LAYER] = option(
    (),
    "Layers, from 0, without experts although first and every give them some; of an "
    "encoder_decoder, in both stacks (Qwen2-MoE's mlp_only_layers).",
  )
  hash_layers: Annotated[int, _OPTIONAL_LAYERS] = option(
    0,
    "The first so many layers with experts take them by the ids of the tokens (router hash_top_k), "
    "with the gates of the router scored_top_k, which the others have (DeepSeek-V4: 3).",
  )
  d_ff: Annotated[int, WIDTH] = option(512, "Hidden width of one expert.")
  latent_width: Annotated[int, OPTIONAL_WIDTH] = option(
    0,
    "Width in which experts compute: one matrix takes a token there, and another one takes the sum "
    "of its experts' outputs back (LatentMoE, Nemotron 3); 0 = d_model.",
  )
  activation: str = option(
    "", "Activation of the experts, one of those of model.activation; '' means the same as there."
  )
  expert_bias: bool = option(
    False,
    "Additive biases on all products with an expert's matrices (gpt-oss); for those of shared "
    "experts see model.mlp_bias.",
  )
  extra_ffn: bool = option(
    False, "A dense FFN with its own norm and residual right before each layer's experts (ST-MoE)."
  )
  num_shared_experts: Annotated[int, EXPERTS] = option(
    0, "Experts of width d_ff that every token visits (DeepSeekMoE).", neutral=0
  )
  shared_gate: bool = option(
    False,
    "Whether the output of shared experts is multiplied by sigmoid(w x) (Qwen1.5-MoE).",
    neutral=False,
  )
  encoder_priority: str = option(
    "", "The router's `priority` in an encoder; '' means the same as in the decoder.", neutral=""
  )
  soft_slots: Annotated[int, EXPERTS] = option(
    0, "Slots an expert of Soft MoE, which then takes the place of any router; 0 = no.", neutral=0
  )
  layer_reduce: Annotated[str, OneOf(LAYER_REDUCE)] = option(
    "mean", "How the auxiliary losses of all layers become one.", neutral="mean"
  )
  allow_noncausal_routing: bool = option(
    False, "Accepts routers that see later tokens, with which a causal model is no longer causal."
  )
