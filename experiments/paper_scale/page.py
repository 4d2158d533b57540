"""Makes the tables of docs/paper_scale.md from the lines of results.jsonl."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from experiments.common import tables
from experiments.paper_scale.rows import COMPARED, MODELS, ROWS
from moe_jax.dryrun.machine.chips import GIB
from moe_jax.dryrun.page import text

FILE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "paper_scale.md"
TABLE = (
  "model",
  "machine, mesh",
  "GiB per device, by arithmetic",
  "sent",
  "seconds for matmuls / memory / networks",
  "binds",
  "tokens per second",
  "MFU",
  "days",
  "measured in the paper",
  "dry run",
)


def make_tables(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
  """Returns the page's tables by marker.

  Args:
    lines: Row -> its line of results, in the order of the rows.
  """
  commands = [
    shlex.join(["python", "-m", "moe_jax.dryrun", *lines[name]["arguments"]])
    for name in ROWS
    if name in lines
  ]
  models = [_model(lines[name]) for name in MODELS if name in lines]
  return {
    "models": "\n".join([_table(TABLE, models), *_reasons(lines)]),
    "exchanges": _table(COLUMNS, _exchanges(lines)),
    "commands": "\n".join(["```", *commands, "```", "", _versions(lines)]),
  }


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  return tables.markdown(head, rows, tables.line(["---"] * len(head)))


def _model(line: Mapping[str, Any]) -> tuple[str, ...]:
  config = f"`{line['arguments'][0].removeprefix('--config=configs/')}`"
  took = (
    f"{line['seconds']} s ({line['cpu_seconds']} s of CPU), {line['resident_bytes'] / GIB:.1f} GiB"
  )
  if "topology" not in line:  # its compiler is missing
    return config, *("",) * (len(TABLE) - 2), took
  where, m = f"{line['topology']}, {text.mesh_words(line['mesh'])}", line["memory"]
  expected = f"{sum(line['expected'].values()) / GIB:.1f}"
  if not line["fits"]:
    return (
      config,
      where,
      f"{m['needs'] / GIB:.1f} of {m['available'] / GIB:.1f}, {expected}: does **not** fit",
      *("",) * (len(TABLE) - 4),
      took,
    )
  r, paper = line["roofline"], line["paper"]
  networks = ", ".join(
    f"{axes} {text.number(seconds)}" for axes, seconds in text.networks(r).items()
  )
  return (
    config,
    where,
    f"{m['peak'] / GIB:.1f} of {m['available'] / GIB:.1f} ({m['peak'] / m['available']:.0%}), "
    f"{expected}",
    text.size(sum(line["wire_bytes"].values())),
    f"{text.number(r['matmuls'])} / {text.number(r['memory'])} / {networks or '-'}",
    r["binds"],
    f"{r['tokens_per_second']:,.0f}",
    f"{r['mfu']:.0%}",
    text.number(r["days"]),
    _paper(paper, line["tokens"]),
    took,
  )


def _paper(paper: Mapping[str, Any] | None, tokens: int) -> str:
  if not paper:
    return "-"
  if not paper["seconds"]:
    return f"{paper['machine']}: {paper['source']}"
  seconds = text.number(paper["seconds"])
  return f"{seconds} s a step of {tokens:,} tokens, {paper['machine']} ({paper['source']})"


def _reasons(lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
  found = [f"- `{name}`: {line['error']}" for name, line in lines.items() if "error" in line]
  return ["", "Why not:", "", *found] if found else []


COLUMNS = (
  "model",
  "dispatcher",
  "all-to-alls",
  "formula",
  "ratio",
  "all bytes sent",
  "GiB per device",
  "seconds for matmuls",
  "seconds for networks",
)


def _exchanges(lines: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
  rows = []
  for name, variants in COMPARED.items():
    for dispatcher, variant in variants.items():
      line = lines.get(variant, {})
      if not line.get("fits"):
        continue
      sent, formula = line["exchange"]["program"], line["exchange"]["formula"]
      networks = ", ".join(
        f"{axes} {text.number(s)}" for axes, s in text.networks(line["roofline"]).items()
      )
      rows.append(
        (
          f"`{name}`",
          f"`{dispatcher}`",
          text.size(sent),
          text.size(formula),
          f"{sent / formula:.2f}",
          text.size(sum(line["wire_bytes"].values())),
          f"{line['memory']['peak'] / GIB:.1f}",
          text.number(line["roofline"]["matmuls"]),
          networks,
        )
      )
  return rows


def _versions(lines: Mapping[str, Mapping[str, Any]]) -> str:
  known = [line["versions"] for line in lines.values() if "versions" in line]
  modes = sorted({line["mode"] for line in lines.values() if "mode" in line})
  words = ", ".join(f"{name} {version}" for name, version in known[0].items()) if known else ""
  return (
    f"Compiled in {' and '.join(modes)} mode (the GPU compiler has only one mode) on 2 CPU cores; "
    f"{words}."
  )
