"""docs/paper_scale.md, from the lines of results.jsonl."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from experiments.paper_scale.rows import COMPARED, MODELS, ROWS
from moe_jax.dryrun.machine.chips import GIB
from moe_jax.dryrun.page import text

FILE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "paper_scale.md"
HEAD = """# The papers' models on machines of the papers' size

Each row is a config's real training step (forward, backward, optimizer), compiled by the machine's
  own compiler from
shapes alone by `python -m moe_jax.dryrun`, on a host without accelerators. **All of it is a
  compiler estimate, not
measured**: no step was run. `make paper-scale` makes this page; `moe_jax/dryrun/machine/meshes.py`
  has the meshes, and
a dry run takes its mesh from there where the command says none.

- *GiB*: peak of a device, of what the compiler says there is, and what arithmetic on shapes expects
  of weights,
  gradients, optimizer state and saved activations. Fast compiles come out some 10% lower than full
    ones; a row counts
  as fitting with room where it is at most 80% full.
- *sent*: bytes that a device puts on the wire a step, all collectives, loops multiplied out.
- *roofline*: seconds that each resource needs alone; the largest binds, and nothing overlaps worse
  than that.
- *MFU*: FLOPs that the model needs, of what the chips could do in the time of what binds.
- *days*: for all steps of the config.
- *dry run*: wall clock and CPU seconds of the whole command, and its memory; rows shared two cores
  with other work.
- Programs with dropless experts (Mixtral, DBRX, DeepSeekMoE) have static shapes, and so room for
  the worst case, in
  which all tokens visit the same device: their FLOPs, memory traffic, bytes and days are upper
    bounds. With one row of
  32,768 tokens a device such buffers need 245 GiB (Mixtral on v5p) to 293 GiB (on H100s): Mixtral
    and DBRX have the
  same 4M tokens a step in rows of 4,096 here, in four microbatches. Their balance loss is over the
    whole batch,
  which takes another forward pass over the microbatches (`training/accumulate.py`).
"""
TABLE = (
  "model",
  "machine, mesh",
  "GiB a device, by arithmetic",
  "sent",
  "matmuls / memory / networks, s",
  "binds",
  "tokens a second",
  "MFU",
  "days",
  "paper measured",
  "dry run",
)


def write(lines: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes the page of these lines, row -> line."""
  FILE.write_text(
    "\n".join(
      [
        HEAD,
        *_table(TABLE, [_model(lines[name]) for name in MODELS if name in lines]),
        *_reasons(lines),
        "",
        "## What the dispatchers send",
        "",
        EXCHANGES,
        *_table(COLUMNS, _exchanges(lines)),
        "",
        "## Commands",
        "",
        "```",
        *(
          shlex.join(["python", "-m", "moe_jax.dryrun", *lines[name]["arguments"]])
          for name in ROWS
          if name in lines
        ),
        "```",
        "",
        _versions(lines),
      ]
    )
    + "\n"
  )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
  return ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]


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


EXCHANGES = """The same models, mesh and batch with each kind of expert parallelism: bytes of
  all-to-alls on the wire, a
device and step, beside the formula (`accounts.exchange_bytes`: rows out and back, forward, backward
  and recomputed),
and everything that is sent. `einsum` leaves the exchange to GSPMD, `all_to_all` writes it down,
  `ragged_all_to_all`
sends only filled rows, of which a program shows the static bound.
"""
COLUMNS = (
  "model",
  "dispatcher",
  "all-to-alls",
  "formula",
  "ratio",
  "all that is sent",
  "GiB a device",
  "matmuls, s",
  "networks, s",
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
    f"Compiled in {' and '.join(modes)} mode (GPUs' compiler has one only) on 2 CPU cores; {words}."
  )
