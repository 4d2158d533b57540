"""Held-out text, each token on the colour of the expert that the router chose first."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.report.colours import expert_colour, ink, tint
from moe_jax.report.style import SCRIPT

MAX_TOKENS = 12_000  # in the whole page: about 50 bytes of HTML each


def routing_section(routing: Mapping[str, Any], layers: Sequence[str]) -> str:
  """The section as HTML; "" if `routing` (see `run/finish.py`) does not hold a page that fits its
  own shape.

  Args:
    routing: {"num_experts": E, "pages": [{"source", "pieces": [text or None], "experts": [[expert]
      x L] x Lm}]}.
    layers: a name for each of the Lm layers.
  """
  experts = routing.get("num_experts")
  if not isinstance(experts, int) or experts < 1:
    return ""
  pages = [page for page in routing.get("pages") or [] if _fits(page, len(layers))]
  if not pages:
    return ""
  room = MAX_TOKENS // len(pages)
  chosen = [np.asarray(page["experts"], int)[:, :room] for page in pages]
  counts = [_count(page[0], experts) for page in chosen]
  body = "".join(
    _page(page, chosen[i][0], counts[i], room, experts) for i, page in enumerate(pages)
  )
  data = {"experts": experts, "layers": list(layers), "pages": [page.tolist() for page in chosen]}
  return (
    '<h2>Held-out text by expert</h2><p class="lead">Each token of the first validation pages '
    "stands on the colour of "
    "its first-choice expert. · is a space, ↵ a line's end, → a tab, ◆ the start of a document or "
    "a masked span. Point at a token for its experts in all layers; click an expert to see only "
    "its tokens.</p>"
    f'<style>{_classes(experts)}</style><div id="routing">{_controls(layers, sum(counts))}<div '
    f'class="pages">{body}</div></div><script type="application/json" '
    f'id="routing-data">{_script_safe(data)}</script><script>{SCRIPT}</script>'
  )


def visible(piece: str | None) -> str:
  """A token's text as HTML: escaped, white space and control characters shown; None is a document's
  start."""
  if piece is None:
    return "◆"
  shown = "".join(
    _MARKS.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in str(piece)
  )
  return html.escape(shown) or "∅"


_MARKS = {" ": "·", "\n": "↵\n", "\t": "→"}


def _fits(page: Any, layers: int) -> bool:
  try:
    experts = np.asarray(page["experts"], int)
    return (
      experts.shape == (layers, len(page["pieces"]))
      and experts.size > 0
      and bool(experts.min() >= 0)
    )
  except (KeyError, TypeError, ValueError):
    return False


def _count(chosen: np.ndarray, experts: int) -> np.ndarray:
  return np.bincount(chosen[chosen < experts], minlength=experts)


def _classes(experts: int) -> str:
  """The full colour in legend and bars; under tokens a tint, which any text can be read on, above a
  band of it."""
  rules = ""
  for e in range(experts):
    full = expert_colour(e)
    rules += f".e{e}{{background:{full};color:{ink(full)}}}"
    rules += f".page .e{e}{{background:{tint(full)};box-shadow:inset 0 -3px {full}}}"
  return rules


def _controls(layers: Sequence[str], counts: np.ndarray) -> str:
  """A button for each layer, and the legend: a button for each expert with its share of all the
  tokens shown."""

  def pressed(i):
    return "true" if i == 0 else "false"

  buttons = "".join(
    f'<button data-layer="{i}" aria-pressed="{pressed(i)}">{html.escape(name)}</button>'
    for i, name in enumerate(layers)
  )
  shares = 100 * counts / max(1, counts.sum())
  chips = "".join(
    f'<button data-expert="{e}" aria-pressed="false"><b class="e{e}">{e}</b>'
    f"<span>{share:.1f} %</span></button>"
    for e, share in enumerate(shares)
  )
  legend = f'<h3>Share of each expert</h3><div class="chips">{chips}</div>'
  return f"<h3>Layer</h3><div>{buttons}</div>{legend}"


def _page(
  page: Mapping[str, Any], chosen: np.ndarray, count: np.ndarray, room: int, experts: int
) -> str:
  """One source: its name, a bar of the experts' shares, its tokens."""

  def blank(piece):
    return " w" if isinstance(piece, str) and not piece.strip() else ""

  tokens = "".join(
    f'<i class="{f"e{expert}" if expert < experts else "none"}"{blank(piece)}>{visible(piece)}</i>'
    for piece, expert in zip(page["pieces"][:room], chosen.tolist(), strict=True)
  )
  bar = "".join(
    f'<i class="e{e}" style="flex:{n} 0 0" title="expert {e}: {100 * n / len(chosen):.1f} %"></i>'
    for e, n in enumerate(count.tolist())
  )
  name = html.escape(str(page.get("source", "")))
  return f'<div><h3>{name}</h3><div class="bar">{bar}</div><div class="page">{tokens}</div></div>'


def _script_safe(data: Any) -> str:
  """JSON that cannot end the script element it stands in."""
  return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
