"""Finds the special tokens that start and end a document by their names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from moe_jax.data.notes import tell
from moe_jax.errors import ConfigError

# The tokens that published models put at the start of a document or, if they have no such token,
# between documents. The first of them that a tokenizer.json declares special is the boundary. New
# names are added at the end, so that the boundary of no existing tokenizer changes.
KNOWN = (
  "<s>",  # LLaMA 1 and 2, Mistral, Mixtral, Baichuan, InternLM
  "<bos>",  # Gemma
  "<|begin_of_text|>",  # LLaMA 3 and 4
  "<|startoftext|>",  # Yi, Jamba, Hunyuan, GPT-OSS
  "<|endoftext|>",  # GPT-2, GPT-NeoX, OLMo and OLMoE, DBRX, Qwen, Phi
  "</s>",  # T5, Switch
  "<eos>",
  "<\uff5cbegin\u2581of\u2581sentence\uff5c>",  # DeepSeek: fullwidth bars, U+2581 as space
  "<BOS_TOKEN>",  # Command R
  "[BOS]",  # Kimi
  "<|end_of_text|>",  # Granite
  "<\uff5cend\u2581of\u2581sentence\uff5c>",
  "<EOS_TOKEN>",
  "[EOS]",
)
# Characters that vocabularies do not contain. They are encoded as the unknown token if there is
# one.
_RARE = "\U0010fffd \u0e5b \u16ff \U00012345"


def known_boundary(special: Mapping[str, int]) -> int | None:
  """Returns the id of the first name of `KNOWN` that is in `special`, or None if there is none.

  Args:
    special: Name -> id of the tokens that are declared special.
  """
  return next((special[name] for name in KNOWN if name in special), None)


def named_id(
  field: str,
  name: str,
  vocabulary: Mapping[str, int],
  special: Mapping[str, int],
  encode: Callable[[str], list[int]],
  shown: str,
) -> int:
  """Returns the id of the token that `data.bos` or `data.eos` names.

  Args:
    field: The key of the config, "data.bos" or "data.eos".
    name: The text of the token.
    vocabulary: Name -> id of all tokens.
    special: Name -> id of the tokens that are declared special.
    encode: Maps text to ids in the way in which documents are encoded.
    shown: The value of `data.tokenizer`, for messages.

  Raises:
    ConfigError: If there is no such token, or if the ids of ordinary text can contain it.
  """
  if name not in vocabulary:
    # Suggest tokens that look like marks, too, because some files do not declare them special.
    candidates = list(special) + [
      token for token in vocabulary if token[:1] in "<[|" and len(token) > 2
    ]
    matches = difflib.get_close_matches(name, dict.fromkeys(candidates), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, matches))}? " if matches else ""
    names = ", ".join(map(repr, list(special)[:8])) or "none"
    raise ConfigError(
      field, name, f"{hint}{shown} has no such token; its special tokens are: {names}"
    )
  token_id = vocabulary[name]
  # Ordinary text can contain the token if its own name is encoded as it, or if it is the unknown
  # token.
  if token_id in encode(name) + encode(_RARE):
    raise ConfigError(
      field,
      name,
      f"is a token of ordinary text in {shown}, so that it cannot mark where documents "
      "start or end; name a special token, or leave this key empty",
    )
  return token_id


def tell_new_id(new: int, special: Mapping[str, int], shown: str) -> None:
  """Prints a note that the new id `new` starts documents, because no known token does."""
  names = ", ".join(map(repr, list(special)[:8])) or "none"
  tell(
    f"{shown} declares no token that is known to start a document, so the new id {new} was added "
    "for that, which no published weights know; set --config.data.bos=NAME to use one of its own "
    f"tokens instead (its special tokens: {names})"
  )
