"""Writes a dry run as report.json, and as report.html, a page that needs no other file."""

from __future__ import annotations

import html
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from moe_jax.dryrun.machine.chips import GIB
from moe_jax.dryrun.page import text
from moe_jax.dryrun.page.charts import Bar, Part, bars
from moe_jax.errors import ConfigError
from moe_jax.report.colours import series_colour, tint
from moe_jax.report.style import CSS

_RESOURCES = {"matmuls": series_colour(0), "memory": series_colour(1)}


def write(directory: pathlib.Path, report: Mapping[str, Any]) -> pathlib.Path:
  """Writes report.json and report.html into a folder and returns the path of the latter.

  Args:
    directory: The folder, which is created if it does not exist.
    report: A report of `plan.plan`.

  Raises:
    ConfigError: If the folder cannot be written.
  """
  write_json(directory / "report.json", report)
  path = directory / "report.html"
  path.write_text(page(report), encoding="utf-8")
  return path


def write_json(path: pathlib.Path, value: Any) -> pathlib.Path:
  """Writes `plain(value)` as JSON into a file and returns the file's path.

  Args:
    path: The file, whose folder is created if it does not exist.
    value: Any value that JSON can represent, apart from numbers that are not finite.

  Raises:
    ConfigError: If the folder cannot be written.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(value), indent=1) + "\n")
  except OSError as error:
    raise ConfigError(
      "workdir",
      str(path.parent),
      f"cannot be written ({error.strerror}); name a writable folder with --workdir=DIR",
    ) from error
  return path


def plain(value: Any) -> Any:
  """Returns `value` with None in place of numbers that are not finite, which JSON lacks."""
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def page(report: Mapping[str, Any]) -> str:
  """Returns the HTML page of a report of `plan.plan`."""
  name = f"{report['config']} on {report['topology']}"
  banner = (
    "" if report["fits"] else f'<p class="banner">This {html.escape(text.shortage(report))}.</p>'
  )
  parts = [
    f"<h1>{html.escape(name)}</h1>",
    f'<p class="meta">{html.escape(_facts(report))}</p>',
    f'<p class="lead">Every figure is a {html.escape(report["label"])}: nothing ran.</p>',
    banner,
    _tiles(report),
    "<h2>Memory of a device</h2>",
    _memory(report),
  ]
  if report["fits"]:
    parts += [
      "<h2>What bounds a step</h2>",
      _roofline(report),
      "<h2>What devices send each other</h2>",
      _collectives(report),
    ]
  parts += ["<h2>In words</h2>", f"<pre>{html.escape(text.text(report))}</pre>"]
  return (
    "<!DOCTYPE html>\n"
    '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
    f'content="width=device-width"><title>{html.escape(name)}: dry '
    f"run</title><style>{CSS}</style></head><body>"
    f"{''.join(parts)}</body></html>\n"
  )


def _facts(report: Mapping[str, Any]) -> str:
  """Returns the line of facts under the title: devices, mesh, batch, mode and versions."""
  versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
  return (
    f"{report['devices']:,} devices · mesh {text.mesh_words(report['mesh'])} · "
    f"{text.batch_words(report)} · {report['mode']} mode · {versions}"
  )


def _tiles(report: Mapping[str, Any]) -> str:
  """Returns the HTML of the key figures, one tile for each."""
  m = report["memory"]
  amount = m["peak"] if report["fits"] else m["needs"]
  tiles = [
    ("of a device's memory", f"{amount / m['available']:.0%}"),
    ("GiB needed", f"{amount / GIB:.2f}"),
  ]
  if report["fits"]:
    r, flops = report["roofline"], report["flops"]
    tiles += [
      ("seconds a step, at best", text.number(r["seconds"])),
      ("binds", r["binds"]),
      ("tokens a second, at most", f"{r['tokens_per_second']:,.0f}"),
      ("MFU, at most", f"{r['mfu']:.0%}"),
      ("times the ideal FLOPs", f"{flops['program'] / flops['ideal']:.2f}"),
      ("days for all steps, at least", text.number(r["days"])),
    ]
  return (
    '<div class="tiles">'
    + "".join(f"<div><b>{html.escape(value)}</b><span>{name}</span></div>" for name, value in tiles)
    + "</div>"
  )


def _memory(report: Mapping[str, Any]) -> str:
  """Returns the chart of a device's memory, by arithmetic and by the compiler."""
  m, expected = report["memory"], report["expected"]

  def part(name, size, colour):
    return Part(name, size / GIB, colour, f"{name}: {size / GIB:.2f} GiB")

  arithmetic = [
    part(kind, size, series_colour(i)) for i, (kind, size) in enumerate(expected.items())
  ]
  rows = [Bar("by arithmetic", arithmetic, f"{sum(expected.values()) / GIB:.2f} GiB")]
  if report["fits"]:
    state_and_batch = min(m["arguments"], m["peak"])
    compiled = [
      part("state and batch", state_and_batch, series_colour(5)),
      part("temporary", m["peak"] - state_and_batch, tint(series_colour(5))),
    ]
    rows.append(Bar("by the compiler", compiled, f"{m['peak'] / GIB:.2f} GiB at the peak"))
  elif not math.isnan(m["needs"]):
    rows.append(
      Bar(
        "by the compiler",
        [part("needed", m["needs"], series_colour(6))],
        f"{m['needs'] / GIB:.2f} GiB",
      )
    )
  limit = f"{report['chip']} has {m['available'] / GIB:.2f}"
  return bars(
    "Weights, gradients, moments, activations",
    rows,
    "GiB",
    limit=(limit, m["available"] / GIB),
    note="The arithmetic counts what is kept, but not a layer's own buffers. The compiler reuses "
    "the memory of values that are no longer needed.",
  )


def _roofline(report: Mapping[str, Any]) -> str:
  """Returns the chart of the seconds that each resource needs in a step."""
  r, paper = report["roofline"], report["paper"]
  networks = text.networks(r)
  times = {"matmuls": r["matmuls"], "memory": r["memory"]} | networks
  colours = _RESOURCES | {axes: series_colour(2 + i) for i, axes in enumerate(networks)}
  labels = {"matmuls": "matmuls", "memory": "memory, at most"}
  rows = [
    Bar(
      labels.get(name, f"network: {name}"),
      [Part(name, duration, colours[name], f"{text.number(duration)} s")],
      f"{text.number(duration)} s{' (binds)' if name == r['binds'] else ''}",
    )
    for name, duration in times.items()
  ]
  if r["cycles"]:
    rows.append(
      Bar(
        "compiler's cycles",
        [Part("cycles", r["cycles"], "#777", "")],
        f"{text.number(r['cycles'])} s, without collectives",
      )
    )
  if paper and paper["seconds"]:
    rows.append(
      Bar(
        "the paper, measured",
        [Part("paper", paper["seconds"], "#bbb", paper["source"])],
        f"{text.number(paper['seconds'])} s, {paper['machine']}",
      )
    )
  # Without names the chart has no legend, which would only repeat the labels of the rows.
  rows = [row._replace(parts=[part._replace(name="") for part in row.parts]) for row in rows]
  return bars(
    "Seconds a step, each resource alone and at full speed",
    rows,
    "s",
    note="The longest bar of a resource bounds the step. That of memory is itself an upper bound.",
  )


def _collectives(report: Mapping[str, Any]) -> str:
  """Returns the chart and the table of what devices send each other."""
  collectives = report["collectives"]
  kinds = {
    kind: series_colour(i) for i, kind in enumerate(sorted({m["kind"] for m in collectives}))
  }
  by_axes: dict[str, list] = {}
  for m in collectives:
    by_axes.setdefault(m["axes"], []).append(m)

  def part(m):
    return Part(
      m["kind"],
      m["wire_bytes"] / GIB,
      kinds[m["kind"]],
      f"{m['kind']}: {text.size(m['wire_bytes'])} in {m['count']:,.0f} executions",
    )

  rows = [
    Bar(
      axes,
      list(map(part, sent)),
      f"{text.size(sum(m['wire_bytes'] for m in sent))}, {sent[0]['network']}",
    )
    for axes, sent in by_axes.items()
  ]
  cells = "".join(
    f"<tr><td>{m['kind']}</td><td>{html.escape(m['axes'])}</td><td>{m['network']}</td>"
    f"<td>{m['group_size']}</td><td>{m['count']:,.0f}</td><td>{text.size(m['wire_bytes'])}</td>"
    f"<td>{text.number(m['seconds'])}</td></tr>"
    for m in collectives
  )
  heads = (
    "collective",
    "mesh axes",
    "network",
    "devices",
    "times a step",
    "sent by a device",
    "seconds",
  )
  exchange = report["exchange"]
  note = (
    f"All-to-alls send {text.size(exchange['program'])} a device; the dispatch formula says "
    f"{text.size(exchange['formula'])}."
    if exchange["formula"] or exchange["program"]
    else ""
  )
  return bars("GiB sent by a device in a step, by mesh axes", rows, "GiB", note=note) + (
    f'<div class="wide"><table><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>'
    f"{cells}</table></div>"
  )
