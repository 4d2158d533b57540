"""The options of a config in words: for `--help=SECTION` and for docs/options.md.

`python -m moe_jax.commands.help --write docs/options.md` renews the page.
"""

from __future__ import annotations

import inspect
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence

from moe_jax.assembly.sections import FUNCTIONS, SECTIONS
from moe_jax.commands.flags import Flag, positional, take_flags
from moe_jax.commands.guarded import guarded
from moe_jax.errors import ConfigError, choose
from moe_jax.options import Key, arguments, keys

_WIDTH = 96
_HEAD_OF_TABLE = "| key | default | values | meaning |\n|---|---|---|---|"
_PAGE_HEAD = """# Options

Every key of a config, as `--config.KEY=VALUE` sets it, with its default, the values that it may
have, and its meaning. `python -m moe_jax.commands.help --write docs/options.md` writes this page
from the declarations; `python -m moe_jax.train --help=model.moe` prints one section of it.
"""


def main(argv: Sequence[str]) -> int:
  """Prints all options, or writes the page; returns the exit code."""
  flags, rest = take_flags(argv[1:], (Flag("write"),), config=False)
  positional(rest, [])
  if "write" in flags:
    try:
      pathlib.Path(flags["write"]).write_text(page())
    except OSError as error:
      remedy = f"{error.strerror}; give a file that can be written, such as docs/options.md"
      raise ConfigError("write", flags["write"], remedy) from error
  else:
    print(section_text("all"))
  return 0


def section_text(name: str) -> str:
  """Returns the options of a section, or of all sections, for a terminal.

  Args:
    name: Dotted name of a section, "run" for the keys that belong to none, or "all".

  Raises:
    ConfigError: There is no such section.
  """
  names = [section or "run" for section in _sections()]
  choose("help", name, [*names, "all"])
  wanted = names if name == "all" else [name]
  return "\n\n".join(_terminal(section) for section in wanted)


def _terminal(name: str) -> str:
  lines = []
  for dotted, default, rule, doc in _rows("" if name == "run" else name):
    lines.append(f"--config.{dotted}={default}")
    words = f"{doc} It {rule}." if doc else f"It {rule}."
    lines += textwrap.wrap(words, _WIDTH, initial_indent="    ", subsequent_indent="    ")
  return "\n".join(lines)


def page() -> str:
  """Returns docs/options.md."""
  parts = [_PAGE_HEAD]
  for section in _sections():
    parts.append(f"## `{section or 'run'}`\n\n{_HEAD_OF_TABLE}")
    for dotted, default, rule, doc in _rows(section):
      cells = (f"`{dotted}`", f"`{default}`", rule.removeprefix("must be "), doc)
      parts[-1] += "\n| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    parts[-1] += "\n"
  return "\n".join(parts)


def _sections() -> list[str]:
  """Returns the dotted names of all sections, routers and dispatchers included."""
  return [*SECTIONS, *FUNCTIONS]


def _rows(section: str) -> Iterator[tuple[str, str, str, str]]:
  """Yields (dotted key, default, rule in words, documentation) of each option of a section."""
  if section in FUNCTIONS:
    for name, function in FUNCTIONS[section].items():
      docs = _argument_docs(function)
      for key in arguments(function).values():
        yield _row(f"{section}.{name}.", key, docs.get(key.name, ""))
    return
  for each in SECTIONS[section]:
    for key in keys(each).values():
      yield _row(f"{section}." if section else "", key, key.doc)


def _row(prefix: str, key: Key, doc: str) -> tuple[str, str, str, str]:
  return prefix + key.name, str(key.default), key.words, doc


def _argument_docs(function: Callable) -> dict[str, str]:
  """Returns what the section Args of a docstring says of each argument."""
  doc = inspect.getdoc(function) or ""
  section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
  entries = re.split(r"^  (\w+): ", section[1] if section else "", flags=re.MULTILINE)[1:]
  return {
    name: " ".join(words.split()) for name, words in zip(entries[::2], entries[1::2], strict=True)
  }


if __name__ == "__main__":
  sys.exit(guarded(sys.argv, __doc__, main))
