"""Which special token starts a document and which one ends it, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from moe_jax.data.notes import tell
from moe_jax.errors import ConfigError

# Tokens that published models put at a document's start or, failing that, between documents; the
# first one that a tokenizer.json declares special is the boundary. New names go to the end, so that
# no known tokenizer changes.
KNOWN = (
  "<s>",  # LLaMA 1 and 2, Mistral, Mixtral, Baichuan, InternLM
  "<bos>",  # Gemma
  "<|begin_of_text|>",  # LLaMA 3 and 4
  "<|startoftext|>",  # Yi, Jamba, Hunyuan, GPT-OSS
  "<|endoftext|>",  # GPT-2, GPT-NeoX, OLMo and OLMoE, DBRX, Qwen, Phi
  "</s>",  # T5, Switch
  "<eos>",
  "<\uff5cbegin\u2581of\u2581sentence\uff5c>",  # DeepSeek: fullwidth bars, U+2581 between the words
  "<BOS_TOKEN>",  # Command R
  "[BOS]",  # Kimi
  "<|end_of_text|>",  # Granite
  "<\uff5cend\u2581of\u2581sentence\uff5c>",
  "<EOS_TOKEN>",
  "[EOS]",
)
# Characters that vocabularies lack, so that the unknown token is seen where there is one.
_RARE = "\U0010fffd \u0e5b \u16ff \U00012345"


def known_boundary(special: Mapping[str, int]) -> int | None:
  """The id of the first name of `KNOWN` in `special` (name -> id of a token that is declared
  special)."""
  return next((special[name] for name in KNOWN if name in special), None)


def named_id(
  field: str,
  name: str,
  vocabulary: Mapping[str, int],
  special: Mapping[str, int],
  encode: Callable[[str], list[int]],
  shown: str,
) -> int:
  """The id of the token that `data.bos` or `data.eos` names.

  Args:
    field: "data.bos" or "data.eos".
    name: the token's text.
    vocabulary: name -> id of all tokens.
    special: the same of those that are declared special.
    encode: text -> ids, as documents are encoded.
    shown: what `data.tokenizer` says.
  Raises:
    ConfigError: there is no such token, or text can contain it.
  """
  if name not in vocabulary:
    marks = list(special) + [token for token in vocabulary if token[:1] in "<[|" and len(token) > 2]
    near = difflib.get_close_matches(name, dict.fromkeys(marks), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    there = ", ".join(map(repr, list(special)[:8])) or "none"
    raise ConfigError(
      field, name, f"{hint}{shown} has no such token; its special tokens are: {there}"
    )
  i = vocabulary[name]
  if i in encode(name) + encode(_RARE):
    raise ConfigError(
      field,
      name,
      f"is a token of ordinary text in {shown}, so that it cannot mark where documents "
      "start or end; name a special token, or leave this key empty",
    )
  return i


def tell_new_id(new: int, special: Mapping[str, int], shown: str) -> None:
  """Says that no token of the tokenizer is known to start documents."""
  there = ", ".join(map(repr, list(special)[:8])) or "none"
  tell(
    f"{shown} declares no token that is known to start a document, so the new id {new} was added "
    "for that, which no published weights know; --config.data.bos=NAME names one of its tokens "
    f"instead (its special tokens: {there})"
  )
