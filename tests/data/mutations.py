"""Damaged inputs for property tests and for longer fuzzing.

Each input is a pure function of an undamaged one and a seed. Code that reads such an input must
either work or raise ConfigError, for every seed.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# A text that small tokenizers are trained on.
WORDS = "".join(f"the quick {i} brown fox jumps over {i * 7 % 13} lazy dogs\n" for i in range(300))
DEEP = "@deep@"  # A placeholder for deeply nested brackets; see `dump`.
_METASPACE = {
  "type": "Metaspace",
  "replacement": "\u2581",
  "prepend_scheme": "never",
  "split": False,
}
_BYTE_LEVEL = {
  "type": "ByteLevel",
  "add_prefix_space": False,
  "trim_offsets": True,
  "use_regex": True,
}
_LETTERS = ["\u2581", *"abcdefghijklmnopqrstuvwxyz,.\n\t <>/s|"]
_PIECES = list(dict.fromkeys(["<unk>", "<s>", "</s>", *_LETTERS, "th", "the", "\u2581the"]))
# Maps a type of model to the part "model" of a tokenizer.json whose unknown token is an ordinary
# entry.
MODELS: dict[str, dict[str, Any]] = {
  "BPE": {
    "type": "BPE",
    "vocab": {p: i for i, p in enumerate(_PIECES)},
    "unk_token": "<unk>",
    "merges": [["t", "h"], ["th", "e"], ["\u2581", "the"]],
  },
  "Unigram": {
    "type": "Unigram",
    "unk_id": 0,
    "vocab": [[p, -float(i)] for i, p in enumerate(_PIECES)],
  },
  "WordLevel": {
    "type": "WordLevel",
    "vocab": {"<unk>": 0, "<s>": 1, "\u2581the": 2, "\u2581a": 3},
    "unk_token": "<unk>",
  },
  "WordPiece": {
    "type": "WordPiece",
    "vocab": {"<unk>": 0, "<s>": 1, "\u2581the": 2, "##the": 3, "\u2581": 4},
    "unk_token": "<unk>",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
  },
}


def spec(model: str, special: tuple[str, ...] = (), /, **changes: Any) -> dict[str, Any]:
  """Returns a complete tokenizer.json around `MODELS[model]`.

  Args:
    model: The type of the model.
    special: The tokens that are declared special. Those that are not in the vocabulary are added.
    **changes: Parts of the file to replace.
  """
  entries = MODELS[model]["vocab"]
  ids = entries if isinstance(entries, dict) else {piece: i for i, (piece, _) in enumerate(entries)}
  added = [
    {
      "id": ids.get(name, len(ids) + i),
      "content": name,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": True,
    }
    for i, name in enumerate(special)
  ]
  split = _METASPACE | {"split": model in ("WordLevel", "WordPiece"), "prepend_scheme": "always"}
  return copy.deepcopy(
    {
      "version": "1.0",
      "truncation": None,
      "padding": None,
      "added_tokens": added,
      "normalizer": None,
      "pre_tokenizer": split if model in ("WordLevel", "WordPiece") else _METASPACE,
      "post_processor": None,
      "decoder": _METASPACE,
      "model": MODELS[model],
    }
    | changes
  )


def mutate_bytes(content: bytes, seed: int) -> bytes:
  """Damages `content` once or several times.

  It is truncated, a bit is flipped, or bytes are overwritten, removed, inserted or repeated.
  """
  rng, out = random.Random(seed), bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 5))):
    at, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 4, 16, 300))
    match rng.randrange(7):
      case 0:
        del out[at:]
      case 1 if at < len(out):
        out[at] ^= 1 << rng.randrange(8)
      case 2:
        out[at : at + length] = b"\xff" * length
      case 3:
        del out[at : at + length]
      case 4:
        out[at:at] = rng.randbytes(length)
      case 5:
        out[at:at] = out[at : at + length]
      case 6:
        out[-length:] = rng.randbytes(length)
  return bytes(out)


def odd_value(rng: random.Random) -> Any:
  """Returns a JSON value that is rarely valid."""
  return rng.choice(
    [
      None,
      True,
      False,
      0,
      -1,
      1,
      2**31 - 1,
      2**31 + 5,
      2**32,
      2**63,
      10**400,
      0.5,
      -0.0,
      1e308,
      float("nan"),
      float("inf"),
      "",
      "0",
      "\ud800",
      "\u2581",
      "<unk>",
      "\x00",
      "a" * 3000,
      [],
      [[]],
      {},
      {"a": {}},
      [0, 0, 0],
      DEEP,
    ]
  )


def dump(value: Any, **options: Any) -> str:
  """Returns JSON in which the string `DEEP` is replaced by brackets too deep for any parser."""
  return json.dumps(value, **options).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)


def mutate_json(value: Any, seed: int) -> Any:
  """Returns `value` with one to three of its nodes replaced, deleted, renamed or exchanged."""
  rng = random.Random(seed)
  root = {"root": copy.deepcopy(value)}
  for _ in range(rng.choice((1, 1, 2, 3))):
    places: list[tuple[Any, Any]] = []
    nodes: list[Any] = [root]
    while nodes:
      node = nodes.pop()
      if len(places) > 2000:
        break
      for key in list(node) if isinstance(node, dict) else range(len(node)):
        places.append((node, key))
        if isinstance(node[key], dict | list):
          nodes.append(node[key])
    # The upper nodes are few, but they matter more than the entries of a vocabulary.
    node, key = rng.choice(places[: rng.choice((12, len(places)))])
    other, place = rng.choice(places)
    match rng.randrange(5):
      case 0 if node is not root:
        del node[key]
      case 1 if isinstance(node, dict) and node is not root:
        node[rng.choice(["", "vocab", "root", "x" * 300])] = node.pop(key)
      case 2:
        node[key] = (
          copy.deepcopy(other[place]) if isinstance(other, dict) or place < len(other) else None
        )
      case _:
        node[key] = odd_value(rng)
  return root["root"]


def tokenizer_json(seed: int) -> bytes:
  """Returns a damaged tokenizer.json of one of the four models, byte-level or with U+2581."""
  rng = random.Random(seed)
  whole = spec(
    rng.choice(sorted(MODELS)), rng.choice(((), ("<s>",), ("<s>", "</s>", "<unk>"), ("<|new|>",)))
  )
  if rng.random() < 0.2:
    whole |= {"pre_tokenizer": _BYTE_LEVEL, "decoder": _BYTE_LEVEL}
  if rng.random() < 0.3:
    return mutate_bytes(
      json.dumps(whole, ensure_ascii=rng.random() < 0.5).encode(), rng.getrandbits(32)
    )
  return dump(mutate_json(whole, rng.getrandbits(32))).encode()


def jsonl(seed: int) -> bytes:
  """Returns lines of which some are not an object with a string "text"."""
  rng, lines = random.Random(seed), []
  for i in range(rng.randrange(2, 12)):
    record: Any = {"text": f"line {i} of a file \u4e16\n", "n": i}
    if rng.random() < 0.2:
      record = mutate_json(record, rng.getrandbits(32))
    lines.append(dump(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
  if rng.random() < 0.1:
    lines.append(b"[" * 100_000)
  content = b"\n".join(lines)
  return mutate_bytes(content, rng.getrandbits(32)) if rng.random() < 0.5 else content


def text(seed: int) -> bytes:
  """Returns up to 200 KB of text: words, long lines, bytes that are not UTF-8, or nothing."""
  rng = random.Random(seed)
  size = rng.choice((0, 1, 100, 65_535, 65_536, 65_537, 200_000))
  unit = rng.choice(
    (b"word \n", b"no line end ", "\u4e16\u754c".encode(), b"\xff\xfe", b"\x80", b"\n", b"\r\n")
  )
  return mutate_bytes((unit * (size // len(unit) + 1))[:size], rng.getrandbits(32))
