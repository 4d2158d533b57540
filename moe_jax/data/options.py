"""The options of the data: the section `data`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from moe_jax.options import NOT_NEGATIVE, ROWS, SEED, Bounds, Options, Text, option

_SHARE = Bounds(
  1e-6, 1, "a share of the tokens or of the documents; at least one of them is held out", below=True
)


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
  """Where text comes from, and how it becomes rows of tokens."""

  sources: Annotated[tuple[str, ...], Text("must be a string, such as 'embedded:prose'")] = option(
    ("embedded:prose", "embedded:code", "embedded:tables"),
    "Sources of text: embedded:NAME, text:GLOB, jsonl:GLOB, or tfds:NAME.",
  )
  weights: Annotated[tuple[float, ...], NOT_NEGATIVE] = option(
    (),
    "Share of each source, 0 for one that is only evaluated on; () = in proportion to tokens "
    "(windows) or documents (stream).",
  )
  pipeline: Literal["windows", "stream"] = option(
    "windows",
    "With windows, text is tokenised once, and its windows are shuffled globally; with stream, "
    "text is tokenised and packed while it is read.",
  )
  tokenizer: str = option("bytes", "The tokenizer: bytes, sentencepiece:FILE, or hf:FILE.")
  bos: str = option(
    "",
    "Name of the token that starts every document, such as '<|endoftext|>'; '' is the one that "
    "published models use, where the file declares it special, or else a new id. Text that spells "
    "such names out is read as text.",
  )
  eos: str = option(
    "",
    "Name of the token that ends every document; '' means that a document ends where the next "
    "starts.",
  )
  objective: Literal["next_token", "span_corruption"] = option(
    "next_token",
    "What is learned: the next token, or to restore masked spans (T5), which an encoder_decoder "
    "needs.",
  )
  seq_len: Annotated[int, ROWS] = option(
    256, "Tokens of a row; of an encoder_decoder, those that the decoder reads."
  )
  encoder_len: Annotated[int, ROWS] = option(256, "Tokens that an encoder reads (span_corruption).")
  noise_density: Annotated[float, _SHARE] = option(
    0.15, "Share of the tokens that are masked (span_corruption)."
  )
  mean_span: Annotated[float, Bounds(1, 2**20, "as seq_len")] = option(
    3.0, "Mean length of a masked span, in tokens (span_corruption)."
  )
  validation_fraction: Annotated[float, _SHARE] = option(
    0.05, "Share of the documents that are held out, chosen by a hash of each document's key."
  )
  seed: Annotated[int, SEED] = option(0, "Seed of the order of the data.")
  threads: Annotated[int, Bounds(0, 1_024, "each is a thread of the operating system")] = option(
    2, "Threads that read ahead; 0 means that nothing is read ahead."
  )
  cache_dir: str = option(
    "", "Where tokenised sources are cached; '' is $XDG_CACHE_HOME/moe_jax or ~/.cache/moe_jax."
  )
  tfds_dir: str = option("", "Where TFDS datasets were prepared; '' is TFDS's own default.")
  text_field: str = option(
    "text", "The field of a JSONL line or a TFDS example that holds its text."
  )
  validation_split: str = option(
    "", "Split of a TFDS source that is held out; '' holds documents out by the hash, as elsewhere."
  )
