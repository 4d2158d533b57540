"""Puts the report of a dry run into words, as the block of lines that the command prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe_jax.dryrun.machine.chips import GIB

_MOST = 8  # the number of collectives that are listed


def text(report: Mapping[str, Any]) -> str:
  """Returns the block of lines for a report of `plan.plan`."""
  rows = {
    "config": report["config"],
    "machine": f"{report['topology']}, {report['devices']:,} devices, mesh "
    f"{mesh_words(report['mesh'])}",
    "batch": batch_words(report),
    "memory": memory_words(report),
    "expected": expected_words(report["expected"]),
  }
  if report["fits"]:
    rows |= {
      "flops": flops_words(report["flops"]),
      "roofline": roofline_words(report["roofline"]),
      "speed": speed_words(report["roofline"]),
    }
    if report["exchange"]["formula"] or report["exchange"]["program"]:
      rows["experts"] = (
        f"all-to-alls send {size(report['exchange']['program'])} a device, the formula says "
        f"{size(report['exchange']['formula'])}"
      )
    rows |= {"compiler": seconds_words(report), "paper": paper_words(report["paper"])}
  lines = [f"{name:>10}: {words}" for name, words in rows.items() if words]
  return "\n".join(
    lines + _collectives(report) + [f"{'':>10}  All of this is a {report['label']}."]
  )


def _collectives(report: Mapping[str, Any]) -> list[str]:
  """Returns the lines of the table of collectives, or [] if there are none."""
  collectives = report.get("collectives") or []
  if not collectives:
    return []
  lines = [f"{'collective':>22}  {'axes':<18}{'network':<9}{'times':>9}{'sent':>12}{'seconds':>10}"]
  lines += [
    f"{m['kind']:>22}  "
    f"{m['axes']:<18}{m['network']:<9}{m['count']:>9,.0f}{size(m['wire_bytes']):>12}"
    f"{number(m['seconds']):>10}"
    for m in collectives[:_MOST]
  ]
  return lines + [f"{'':>22}  and {len(collectives) - _MOST} more"] * (len(collectives) > _MOST)


def mesh_words(mesh: Mapping[str, int]) -> str:
  """Returns the mesh without axes of size 1, such as "data=4 expert=64"."""
  return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def batch_words(report: Mapping[str, Any]) -> str:
  """Returns the rows, tokens and microbatches of a step."""
  parts = report["accumulate_steps"]
  cut = f", in {parts} microbatches" if parts > 1 else ""
  return f"{report['batch_size']:,} rows, {report['tokens']:,} tokens a step{cut}"


def memory_words(report: Mapping[str, Any]) -> str:
  """Returns whether the program fits, and how near it is to the limit."""
  m = report["memory"]
  if not report["fits"]:
    needs = "more" if math.isnan(m["needs"]) else f"at least {m['needs'] / GIB:.2f} GiB"
    return f"does NOT fit: needs {needs} of {m['available'] / GIB:.2f} GiB a device"
  return (
    f"fits: {m['peak'] / GIB:.2f} of {m['available'] / GIB:.2f} GiB a device "
    f"({m['peak'] / m['available']:.0%}; {report['mode']} mode), {m['arguments'] / GIB:.2f} of "
    "them state and batch"
  )


def expected_words(expected: Mapping[str, float]) -> str:
  """Returns the expected memory by kind, as `ideal.memory` computes it."""
  parts = ", ".join(f"{bytes_ / GIB:.2f} {kind}" for kind, bytes_ in expected.items())
  return f"{sum(expected.values()) / GIB:.2f} GiB by arithmetic: {parts}"


def flops_words(flops: Mapping[str, float]) -> str:
  """Returns the program's FLOPs beside the ideal ones."""
  uncounted = f"; {flops['unknown_loops']} loops counted once" if flops["unknown_loops"] else ""
  return (
    f"{flops['program']:.4g} a device and step, {flops['program'] / flops['ideal']:.2f} times the "
    f"ideal {flops['ideal']:.4g}{uncounted}"
  )


def roofline_words(roofline: Mapping[str, Any]) -> str:
  """Returns the seconds of each resource, and the one that binds."""
  parts = [f"matmuls {number(roofline['matmuls'])}", f"memory at most {number(roofline['memory'])}"]
  parts += [f"{axes} {number(duration)}" for axes, duration in networks(roofline).items()]
  return f"{', '.join(parts)} s; {roofline['binds']} binds"


def networks(roofline: Mapping[str, Any]) -> dict[str, float]:
  """Returns the seconds of each network, except those below 1% of the slowest resource."""
  # The comparison is negated so that networks of unknown speed, whose time is NaN, stay in.
  return {
    axes: duration
    for axes, duration in roofline["networks"].items()
    if not duration < roofline["seconds"] / 100
  }


def speed_words(roofline: Mapping[str, Any]) -> str:
  """Returns the shortest time of a step, tokens per second, MFU and days for all steps."""
  cycles = roofline["cycles"]
  by_cycles = f"; {number(cycles)} s without collectives by the compiler's cycles" if cycles else ""
  return (
    f"at best {number(roofline['seconds'])} s a step, {roofline['tokens_per_second']:,.0f} tokens "
    f"a second, MFU {roofline['mfu']:.0%}, {number(roofline['days'])} days for all steps{by_cycles}"
  )


def seconds_words(report: Mapping[str, Any]) -> str:
  """Returns what the dry run itself cost, and the versions of the packages."""
  seconds = report["seconds"]
  cached = ", known from before" if seconds["cached"] else ""
  versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
  return (
    f"traced in {seconds['trace']:.0f} s, compiled in {seconds['compile']:.0f} s{cached}, "
    f"{seconds['resident_bytes'] / GIB:.1f} GiB resident; {versions}"
  )


def paper_words(paper: Mapping[str, Any] | None) -> str:
  """Returns what the paper measured, or "" if there is no such figure."""
  if not paper:
    return ""
  step = (
    f"{number(paper['seconds'])} s a step on {paper['machine']}"
    if paper["seconds"]
    else f"on {paper['machine']}"
  )
  return f"measured there: {step} ({paper['source']})"


def size(count: int | float) -> str:
  """Returns bytes as text, in the unit (a power of 1024) that suits their number."""
  units = ("B", "KiB", "MiB", "GiB", "TiB")
  step = min(int(math.log(max(count, 1), 1024)), len(units) - 1)
  value = count / 1024**step
  return f"{value:.0f} {units[step]}" if value >= 1000 else f"{value:.3g} {units[step]}"


def number(value: int | float) -> str:
  """Returns a number with three digits, or "?" if it is NaN, which means unknown."""
  return "?" if math.isnan(value) else f"{value:.3g}"


def shortage(report: Mapping[str, Any]) -> str:
  """Returns a clause that says how much memory a program lacks, in GiB, and what would help.

  Args:
    report: A report of `plan.plan` about a program that needs more memory than its chips have.
  """
  m = report["memory"]
  missing = (
    ""
    if math.isnan(m["needs"])
    else (
      f"; needs {m['needs'] / GIB:.2f} GiB a device, {report['chip']} has "
      f"{m['available'] / GIB:.2f}, short by "
      f"{(m['needs'] - m['available']) / GIB:.2f}"
    )
  )
  expected = sum(report["expected"].values())
  help_ = list(report["remedies"])
  # The remedies above make only the expected memory smaller, so a large rest needs other ones.
  if expected < 0.7 * m["needs"]:
    help_.append(
      f"arithmetic explains only {expected / GIB:.3g} GiB of it, and the rest is buffers within a "
      "layer, which a smaller model.moe.group_size, another dispatcher or a larger mesh.tensor "
      "makes smaller"
    )
  return f"does not fit{missing}; what would help: {'; '.join(help_) or 'more devices'}"
