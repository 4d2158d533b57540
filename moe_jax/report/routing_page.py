"""Shows held-out text with each token on the colour of its first-choice expert."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.report.colours import expert_colour, ink, tint
from moe_jax.report.kinds import kinds_section
from moe_jax.report.style import SCRIPT, script_safe

MAX_TOKENS = 12_000  # in the whole report; a token takes about 50 bytes of HTML


def routing_section(routing: Mapping[str, Any], layers: Sequence[str]) -> str:
  """Returns the section as HTML, or "" if `routing` holds no valid page.

  A page is left out if its parts are missing or do not have the shapes given below.

  Args:
    routing: The contents of routing.json as `run/finish.py` writes it: {"num_experts": E, "pages":
      [{"source": name, "pieces": [L], "experts": [Lm, L]}, ...]}. A piece is the text of a token,
      or None for a special token. An expert of E means that no expert got the token.
    layers: A name for each of the Lm layers with experts.
  """
  experts = routing.get("num_experts")
  if not isinstance(experts, int) or experts < 1:
    return ""
  pages = [page for page in routing.get("pages") or [] if _fits(page, len(layers))]
  if not pages:
    return ""
  max_tokens = MAX_TOKENS // len(pages)
  chosen = [np.asarray(page["experts"], int)[:, :max_tokens] for page in pages]
  # The HTML shows the first layer. The script switches to the others, with the data below.
  counts = [_count(page[0], experts) for page in chosen]
  body = "".join(
    _page(page, chosen[i][0], counts[i], max_tokens, experts) for i, page in enumerate(pages)
  )
  controls = _controls(layers, np.sum(counts, axis=0))
  data = {"experts": experts, "layers": list(layers), "pages": [page.tolist() for page in chosen]}
  return (
    '<h2>Held-out text by expert</h2><p class="lead">Each token of the first validation pages '
    "stands on the colour of its first-choice expert. · is a space, ↵ a line's end, → a tab, ◆ the "
    "start of a document or a masked span, ◌ a part of a character that a later token completes. "
    "Point at a token for its experts in all layers; click an expert to see only its tokens.</p>"
    f'<style>{_classes(experts)}</style><div id="routing">{controls}<div '
    f'class="pages">{body}</div></div><script type="application/json" '
    f'id="routing-data">{script_safe(data)}</script><script>{SCRIPT}</script>'
    + kinds_section(
      [piece for page in pages for piece in page["pieces"][:max_tokens]],
      np.concatenate(chosen, axis=1),
      experts,
      layers,
    )
  )


def visible(piece: str | None) -> str:
  """Returns a token's text as escaped HTML with visible white space and control characters.

  Args:
    piece: The text of the token. None stands for a special token, such as one that starts a
      document or replaces a masked span. "" stands for a token that is only a part of a character.
  """
  if piece is None:
    return "◆"
  shown = "".join(
    _MARKS.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in str(piece)
  )
  return html.escape(shown) or "◌"


_MARKS = {" ": "·", "\n": "↵\n", "\t": "→"}


def _fits(page: Any, layers: int) -> bool:
  """Returns whether a page has one expert for each piece and each of the `layers` layers."""
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
  """Returns the number of tokens of each expert; tokens without an expert are not counted."""
  return np.bincount(chosen[chosen < experts], minlength=experts)


def _classes(experts: int) -> str:
  """Returns the CSS rules of the experts' colours.

  The legend and the bars have the full colour. Tokens have a tint of it, on which text can be read,
  and a band of the full colour below.
  """
  rules = ""
  for e in range(experts):
    full = expert_colour(e)
    rules += f".e{e}{{background:{full};color:{ink(full)}}}"
    rules += f".page .e{e}{{background:{tint(full)};box-shadow:inset 0 -3px {full}}}"
  return rules


def _controls(layers: Sequence[str], counts: np.ndarray) -> str:
  """Returns the buttons of the layers and the legend.

  The legend has a button for each expert with its share of all tokens that are shown.
  """

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
  page: Mapping[str, Any], chosen: np.ndarray, count: np.ndarray, max_tokens: int, experts: int
) -> str:
  """Returns the HTML of one source: its name, a bar of the experts' shares, and its tokens."""

  def blank(piece):
    # The attribute makes the marks that stand for white space pale.
    return " w" if isinstance(piece, str) and not piece.strip() else ""

  tokens = "".join(
    f'<i class="{f"e{expert}" if expert < experts else "none"}"{blank(piece)}>{visible(piece)}</i>'
    for piece, expert in zip(page["pieces"][:max_tokens], chosen.tolist(), strict=True)
  )
  bar = "".join(
    f'<i class="e{e}" style="flex:{n} 0 0" title="expert {e}: {100 * n / len(chosen):.1f} %"></i>'
    for e, n in enumerate(count.tolist())
  )
  name = html.escape(str(page.get("source", "")))
  return f'<div><h3>{name}</h3><div class="bar">{bar}</div><div class="page">{tokens}</div></div>'
