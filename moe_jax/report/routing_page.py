"""Shows held-out text with each token on the colour of its first-choice expert."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from moe_jax.report.colours import expert_colour, ink, tint
from moe_jax.report.kinds import kinds_section
from moe_jax.report.pairs import pairs_section
from moe_jax.report.style import SCRIPT, script_safe

MAX_TOKENS = 12_000  # in the whole report; a token takes about 50 bytes of HTML


def routing_section(routing: Mapping[str, Any], layers: Sequence[str]) -> str:
  """Returns the section as HTML, or "" if `routing` holds no valid page.

  A page is left out if its parts are missing or do not have the shapes given below.

  Args:
    routing: The contents of routing.json as `run/finish.py` writes it: {"num_experts": E, "pages":
      [{"source": name, "pieces": [L], "experts": [Lm, L], "second": [Lm, L]}, ...]}. A piece is
      the text of a token, or None for a special token. An expert of E means that no expert got the
      token. Second choices may be missing.
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
    f"<div><h3>{html.escape(str(page.get('source', '')))}</h3>"
    f"{tokens_page(i, page['pieces'][:max_tokens], chosen[i][0], experts)}</div>"
    for i, page in enumerate(pages)
  )
  controls = _controls(layers, np.sum(counts, axis=0))
  data = {"experts": experts, "layers": list(layers), "pages": [page.tolist() for page in chosen]}
  return (
    '<h2>Held-out text by expert</h2><p class="lead">Each token of the first validation pages '
    "stands on the colour of its first-choice expert. · is a space, ↵ a line's end, → a tab, ◆ the "
    "start of a document or a masked span, ◌ a part of a character that a later token completes. "
    "Point at a token for its experts in all layers; click an expert to see only its tokens.</p>"
    + coloured(f'{controls}<div class="pages">{body}</div>', data)
    + f"<script>{SCRIPT}</script>"
    + kinds_section(
      [piece for page in pages for piece in page["pieces"][:max_tokens]],
      np.concatenate(chosen, axis=1),
      experts,
      layers,
    )
    + _pairs(pages, chosen, experts, layers)
  )


def _pairs(
  pages: Sequence[Mapping[str, Any]], chosen: Sequence[np.ndarray], experts: int, layers
) -> str:
  """Returns the section of pairs of experts, or "" unless all pages have second choices.

  Args:
    pages: The pages of routing.json.
    chosen: The experts of each page that are shown.
    experts: The number of experts E.
    layers: The names of the layers.
  """
  seconds = [{**page, "experts": page.get("second")} for page in pages]
  if not all(_fits(second, len(layers)) for second in seconds):
    return ""
  shown = [
    np.asarray(page["experts"], int)[:, : first.shape[1]]
    for page, first in zip(seconds, chosen, strict=True)
  ]
  return pairs_section(
    np.concatenate(chosen, axis=1), np.concatenate(shown, axis=1), experts, layers
  )


def coloured(body: str, data: Mapping[str, Any]) -> str:
  """Returns HTML whose pages of tokens have colours, and which `SCRIPT` brings to life.

  Args:
    body: HTML with `tokens_page`s, and perhaps with `controls`.
    data: {"experts": E, "layers": names, "pages": the experts of each text, [Lm][tokens]}.
  """
  return (
    f'<style>{_classes(data["experts"])}</style><div class="routing">{body}'
    f'<script type="application/json">{script_safe(data)}</script></div>'
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
  legend = f"<h3>Share of each expert</h3>{chips(len(counts), counts)}"
  return f"<h3>Layer</h3><div>{buttons}</div>{legend}"


def chips(experts: int, counts: Int[np.ndarray, "E"] | None = None) -> str:
  """Returns a button of each expert, which shows only its tokens, with its share of `counts`."""
  shares = [""] * experts
  if counts is not None:
    shares = [f"<span>{share:.1f} %</span>" for share in 100 * counts / max(1, counts.sum())]
  buttons = "".join(
    f'<button data-expert="{e}" aria-pressed="false"><b class="e{e}">{e}</b>{share}</button>'
    for e, share in enumerate(shares)
  )
  return f'<div class="chips">{buttons}</div>'


def tokens_page(
  text: int,
  pieces: Sequence[str | None],
  chosen: Int[np.ndarray, "N"],
  experts: int,
  layer: int | None = None,
  starts: Bool[np.ndarray, "N"] | None = None,
) -> str:
  """Returns a bar of the experts' shares, and the tokens of a text on the colours of their experts.

  Args:
    text: The index of the text in the data of `coloured`.
    pieces: The text of each of N tokens.
    chosen: The expert of each token in the layer that is shown first.
    experts: The number of experts E, which also stands for no expert.
    layer: The index of the only layer that the page shows. None means that buttons choose it.
    starts: Whether each token begins a stretch of text that does not go on from the one before.
  """

  def attributes(piece, is_start):
    # They make the marks that stand for white space pale, and put a mark before a stretch.
    is_blank = isinstance(piece, str) and not piece.strip()
    return f"{' s' if is_start else ''}{' w' if is_blank else ''}"

  breaks = [False] * len(pieces) if starts is None else starts.tolist()
  tokens = "".join(
    f'<i class="{f"e{expert}" if expert < experts else "none"}"{attributes(piece, is_start)}>'
    f"{visible(piece)}</i>"
    for piece, expert, is_start in zip(pieces, chosen.tolist(), breaks, strict=True)
  )
  bar = "".join(
    f'<i class="e{e}" style="flex:{n} 0 0" title="expert {e}: {100 * n / len(chosen):.1f} %"></i>'
    for e, n in enumerate(_count(chosen, experts).tolist())
  )
  at = "" if layer is None else f' data-at="{layer}"'
  return f'<div class="bar">{bar}</div><div class="page" data-text="{text}"{at}>{tokens}</div>'
