"""Mutates configs, command lines and files at random."""

from __future__ import annotations

import json
import math
import pathlib
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

NUMBERS = (
  0,
  1,
  -1,
  2,
  3,
  7,
  64,
  1000,
  2**16,
  2**20,
  2**31 - 1,
  2**31,
  2**32 - 1,
  2**32,
  2**63,
  10**20,
  10**400,
  0.0,
  0.5,
  1.0,
  -0.5,
  1e-45,
  1e-30,
  1e-8,
  1e20,
  1e30,
  math.inf,
  -math.inf,
  math.nan,
  True,
  False,
  None,
)
TEXTS = (
  "",
  " ",
  "None",
  "none",
  "top_k",
  "switch",
  "base",
  "decoder",
  "lstm",
  "brainformer",
  "encoder_decoder",
  "latent",
  "relative",
  "rope",
  "stream",
  "span_corruption",
  "adafactor",
  "wsd",
  "rsqrt",
  "bfloat16",
  "full",
  "dots",
  "all",
  "global",
  "gate",
  "tanh",
  "scatter",
  "ragged_all_to_all",
  "expert_choice",
  "hash_layer",
  "sinkhorn",
  "hierarchical",
  "a\0b",
  "a\nb",
  "\udc80",
  "é世",
  "x" * 5000,
  "../..",
  "~nobody/x",
  "/",
  "text:/nowhere/*",
  "hf:/nowhere",
)
ENTRIES = (
  "attention",
  "ffn",
  "moe",
  "moe:gate=top_2",
  "moe:hidden=8,capacity=1",
  "attention:heads=3",
  "moe:hidden=0",
  "embedded:prose",
  "text:",
  "router",
  "fsdp",
  "data",
  "nobody",
)
SHARE_OF_OTHER_TYPES = 0.15


def value(draw: random.Random, before: Any) -> Any:
  """Returns a value to put in place of `before`, mostly of the same type."""
  if draw.random() < SHARE_OF_OTHER_TYPES:
    return draw.choice(
      [*NUMBERS, *TEXTS, (), (1,), ("a",), (None,), ((),), [], {}, {"name": "top_k"}, b"x", 1j]
    )
  if isinstance(before, str):
    return draw.choice(TEXTS)
  if isinstance(before, (tuple, list)):
    return tuple(
      draw.choice([*ENTRIES, *NUMBERS]) if draw.random() < 0.2 else draw.choice(ENTRIES)
      for _ in range(draw.randrange(4))
    )
  if isinstance(before, bool):
    return not before
  # Some values are close to what works, so that later checks get their turn.
  if draw.random() < 0.4:
    return draw.choice(
      [before or 1] if isinstance(before, float) else [0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 31, 100]
    )
  return draw.choice(NUMBERS)


def config(draw: random.Random, c: ConfigDict) -> dict[str, Any]:
  """Changes one to three places of a config, and returns key -> new value.

  The places may be branches, and keys that do not exist.
  """
  changes = {}
  keys = dotted(c)
  for _ in range(draw.choice((1, 1, 1, 2, 3))):
    key = draw.choice(keys)
    *parents, name = key.split(".")
    node = c
    for parent in parents:
      node = node[parent] if isinstance(node, ConfigDict) and parent in node else ConfigDict()
    if not isinstance(node, ConfigDict):
      continue
    with node.unlocked():
      what = draw.random()
      before = node[name] if name in node else None
      if name in node:
        del node[name]
      if what < 0.04:
        changes[key] = "(deleted)"
      elif what < 0.07:
        node[name], node[name + "_"] = before, 1
        changes[key + "_"] = 1
      else:
        node[name] = changes[key] = 5 if isinstance(before, ConfigDict) else value(draw, before)
  return changes


def dotted(c: ConfigDict, prefix: str = "") -> list[str]:
  """Returns all dotted keys of a config, including those of branches."""
  keys = []
  for key, inside in c.items():
    keys += [
      prefix + key,
      *(dotted(inside, f"{prefix}{key}.") if isinstance(inside, ConfigDict) else []),
    ]
  return keys


def arguments(draw: random.Random, keys: Sequence[str], c: ConfigDict) -> list[str]:
  """Returns some arguments of a command line: mostly overrides, some of which are broken."""
  words = []
  for _ in range(draw.choice((1, 1, 2, 3))):
    key = draw.choice(keys)
    node: Any = c
    for part in key.split("."):
      node = node[part]
    text = str(value(draw, None if isinstance(node, ConfigDict) else node))
    words += draw.choices(
      [
        [f"--config.{key}={text}"],
        [f"--config.{key}", text],
        [f"-config.{key}={text}"],
        [f"--noconfig.{key}"],
        [f"--config.model.moe={text}"],
        [f"--config={text}"],
        [f"--{text}"],
        [text],
        [f"--workdir={text}"],
        [f"--distributed={text}"],
        [f"--config.{key}_={text}"],
        [f"--config.{key[:-1]}={text}"],
      ],
      weights=[60, 5, 3, 2, 3, 1, 2, 2, 1, 1, 2, 2],
    )[0]
  return words


def _flip(draw: random.Random, path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  for _ in range(draw.choice((1, 8))):
    if data:
      data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
  path.write_bytes(data)


def _truncate(draw: random.Random, path: pathlib.Path) -> None:
  data = path.read_bytes()
  path.write_bytes(data[: draw.randrange(len(data))] if data else b"")


def _replace(content: bytes) -> Callable[[random.Random, pathlib.Path], Any]:
  return lambda draw, path: path.write_bytes(content)


def _directory(draw: random.Random, path: pathlib.Path) -> None:
  del draw
  path.unlink()
  path.mkdir()


def _loop(draw: random.Random, path: pathlib.Path) -> None:
  del draw
  path.unlink()
  path.symlink_to(path.name)


def _insert(draw: random.Random, path: pathlib.Path) -> None:
  lines = path.read_bytes().split(b"\n")
  lines.insert(
    draw.randrange(len(lines) + 1), draw.choice((b"", b"{", b"null", b"\xff\xfe", b"\0" * 9))
  )
  path.write_bytes(b"\n".join(lines))


def _retype(draw: random.Random, path: pathlib.Path) -> None:
  """Puts another JSON value in place of one inside the file, or of all of a file without JSON."""
  other = draw.choice((None, [], {}, 0, -1, 1e400, "", "x", True, [1], {"a": 1}, 2**70))
  lines = path.read_bytes().split(b"\n") if path.suffix == ".jsonl" else [path.read_bytes()]
  place = draw.randrange(max(len(lines) - 1, 1))
  try:
    whole = json.loads(lines[place])
  except ValueError:
    whole = None
  node = whole
  while isinstance(node, (dict, list)) and node:
    key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
    if not isinstance(node[key], (dict, list)) or not node[key] or draw.random() < 0.3:
      node[key] = other
      break
    node = node[key]
  else:
    whole = other
  lines[place] = json.dumps(whole).encode()
  path.write_bytes(b"\n".join(lines))


FILES: Mapping[str, Callable[[random.Random, pathlib.Path], Any]] = {
  "flip bits": _flip,
  "truncate": _truncate,
  "delete": lambda draw, path: path.unlink(),
  "directory": _directory,
  "symlink to itself": _loop,
  "other JSON inside": _retype,
  "another line": _insert,
  "empty": _replace(b""),
  "invalid UTF-8": _replace(b"\xff\xfe{}\x80"),
  "deep nesting": _replace(b"[" * 100_000),
  "null": _replace(b"null"),
  "a list": _replace(b"[1, 2]"),
  "a number": _replace(b"7"),
  "a string": _replace(b'"x"'),
  "zeros": _replace(b"\0" * 64),
}


def remove(path: pathlib.Path) -> None:
  """Removes a path, whatever it is, if it exists."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
