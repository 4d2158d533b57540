"""What a dry run found, in words: the block that the command prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe_jax.dryrun.machine.chips import GIB

_MOST = 8  # collectives listed


def text(report: Mapping[str, Any]) -> str:
  """The block, one line a question. `report` is of `plan.plan`."""
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
  found = report.get("collectives") or []
  if not found:
    return []
  lines = [f"{'collective':>22}  {'axes':<18}{'network':<9}{'times':>9}{'sent':>12}{'seconds':>10}"]
  lines += [
    f"{m['kind']:>22}  "
    f"{m['axes']:<18}{m['network']:<9}{m['count']:>9,.0f}{size(m['wire_bytes']):>12}"
    f"{number(m['seconds']):>10}"
    for m in found[:_MOST]
  ]
  return lines + [f"{'':>22}  and {len(found) - _MOST} more"] * (len(found) > _MOST)


def mesh_words(mesh: Mapping[str, int]) -> str:
  """data=4 expert=64, without axes of one."""
  return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def batch_words(report: Mapping[str, Any]) -> str:
  """Rows and tokens a step."""
  parts = report["accumulate_steps"]
  cut = f", in {parts} microbatches" if parts > 1 else ""
  return f"{report['batch_size']:,} rows, {report['tokens']:,} tokens a step{cut}"


def memory_words(report: Mapping[str, Any]) -> str:
  """Whether it fits, and how far from the limit."""
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
  """Memory by kind, by arithmetic."""
  parts = ", ".join(f"{bytes_ / GIB:.2f} {kind}" for kind, bytes_ in expected.items())
  return f"{sum(expected.values()) / GIB:.2f} GiB by arithmetic: {parts}"


def flops_words(flops: Mapping[str, float]) -> str:
  """The program's FLOPs beside the ideal ones."""
  lost = f"; {flops['unknown_loops']} loops counted once" if flops["unknown_loops"] else ""
  return (
    f"{flops['program']:.4g} a device and step, {flops['program'] / flops['ideal']:.2f} times the "
    f"ideal {flops['ideal']:.4g}{lost}"
  )


def roofline_words(roofline: Mapping[str, Any]) -> str:
  """Seconds of each resource, and which binds."""
  parts = [f"matmuls {number(roofline['matmuls'])}", f"memory at most {number(roofline['memory'])}"]
  parts += [f"{axes} {number(took)}" for axes, took in networks(roofline).items()]
  return f"{', '.join(parts)} s; {roofline['binds']} binds"


def networks(roofline: Mapping[str, Any]) -> dict[str, float]:
  """Seconds of each network, those below a hundredth of what binds left out."""
  return {
    axes: took
    for axes, took in roofline["networks"].items()
    if not took < roofline["seconds"] / 100
  }


def speed_words(roofline: Mapping[str, Any]) -> str:
  """Tokens a second, MFU, days."""
  cycles = roofline["cycles"]
  own = f"; {number(cycles)} s without collectives by the compiler's cycles" if cycles else ""
  return (
    f"at best {number(roofline['seconds'])} s a step, {roofline['tokens_per_second']:,.0f} tokens "
    f"a second, MFU {roofline['mfu']:.0%}, {number(roofline['days'])} days for all steps{own}"
  )


def seconds_words(report: Mapping[str, Any]) -> str:
  """What the dry run itself cost, and its versions."""
  took = report["seconds"]
  known = ", known from before" if took["cached"] else ""
  versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
  return (
    f"traced in {took['trace']:.0f} s, compiled in {took['compile']:.0f} s{known}, "
    f"{took['resident_bytes'] / GIB:.1f} GiB resident; {versions}"
  )


def paper_words(paper: Mapping[str, Any] | None) -> str:
  """What the paper measured."""
  if not paper:
    return ""
  step = (
    f"{number(paper['seconds'])} s a step on {paper['machine']}"
    if paper["seconds"]
    else f"on {paper['machine']}"
  )
  return f"measured there: {step} ({paper['source']})"


def size(count: int | float) -> str:
  """Bytes, in units of 1024."""
  units = ("B", "KiB", "MiB", "GiB", "TiB")
  step = min(int(math.log(max(count, 1), 1024)), len(units) - 1)
  value = count / 1024**step
  return f"{value:.0f} {units[step]}" if value >= 1000 else f"{value:.3g} {units[step]}"


def number(value: int | float) -> str:
  """Three digits; "?" for what is not known."""
  return "?" if math.isnan(value) else f"{value:.3g}"


def shortage(report: Mapping[str, Any]) -> str:
  """That it does not fit, by how much, and what would help: one sentence."""
  m = report["memory"]
  short = (
    ""
    if math.isnan(m["needs"])
    else (
      f"; needs {m['needs'] / GIB:.2f} GiB a device, {report['chip']} has "
      f"{m['available'] / GIB:.2f}, short by "
      f"{(m['needs'] - m['available']) / GIB:.2f}"
    )
  )
  kept = sum(report["expected"].values())
  help_ = list(report["remedies"])
  if kept < 0.7 * m["needs"]:
    help_.append(
      f"arithmetic explains only {kept / GIB:.3g} GiB of it, and the rest are buffers within a "
      "layer, which a smaller model.moe.group_size, another dispatcher or a larger mesh.tensor "
      "lower"
    )
  return f"does not fit{short}; what would help: {'; '.join(help_) or 'more devices'}"
