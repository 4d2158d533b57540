"""Writes docs/paper_scale.md from the lines of results.jsonl."""

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

Each row is the real training step of a config (forward, backward, optimizer), compiled by the
machine's own compiler. `python -m moe_jax.dryrun` compiles it from shapes alone, on a host without
accelerators. **All numbers are compiler estimates, not measurements**: no step was run.
`make paper-scale` generates this page. The meshes are in `moe_jax/dryrun/machine/meshes.py`, which
is also where a dry run takes its mesh from if its command does not name one.

- *GiB*: the peak memory of a device, out of the memory that the compiler reports as available, and
  the amount that arithmetic on shapes predicts for weights, gradients, optimizer state and saved
  activations. Fast compiles report about 10% less than full ones; a row counts as fitting with room
  to spare if it uses at most 80% of the memory.
- *sent*: bytes that a device sends in one step, summed over all collectives and all iterations of
  loops.
- *seconds for matmuls / memory / networks* (the roofline): the time that each resource would need
  by itself. The largest of them binds: no overlap can make the step faster than that.
- *MFU*: the FLOPs that the model needs, as a share of what the chips could do in the time of the
  resource that binds.
- *days*: the time for all training steps of the config.
- *dry run*: wall-clock and CPU seconds of the whole command, and its memory. The runs shared two
  cores with other work.
- Programs with dropless experts (Mixtral, DBRX, DeepSeekMoE) have static shapes and therefore
  reserve room for the worst case, in which all tokens visit the same device. Their FLOPs, memory
  traffic, bytes and days are upper bounds. With one row of 32,768 tokens per device, such buffers
  need 245 GiB (Mixtral on v5p) to 293 GiB (on H100s). Mixtral and DBRX therefore have the same 4M
  tokens per step in rows of 4,096 here, in four microbatches. Their balance loss is taken over the
  whole batch, which requires another forward pass over the microbatches
  (`training/accumulate.py`).
"""
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


EXCHANGES = """This table shows the same models, meshes and batches with each kind of expert
parallelism. It compares the bytes that the all-to-alls of one device send in one step with the
formula (`accounts.exchange_bytes`: rows out and back in the forward pass, the backward pass and the
recomputation), and shows all bytes that are sent. `einsum` leaves the exchange to GSPMD,
`all_to_all` writes it out, and `ragged_all_to_all` sends only filled rows, for which a program
shows the static bound.
"""
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
