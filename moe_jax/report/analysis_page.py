"""The page of `python -m moe_jax analyse`: what the experts of a model specialise in."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.findings import CLAIMS, FAILS, HOLDS, sentences
from moe_jax.analysis.information import relative
from moe_jax.analysis.recorded import Recorded
from moe_jax.report.charts import Level, Line, line_chart
from moe_jax.report.colours import load_pixels, png, series_colour
from moe_jax.report.routing_page import chips, coloured, tokens_page, visible
from moe_jax.report.sections import document
from moe_jax.report.style import SCRIPT
from moe_jax.report.tables import MOST_EXPERTS, expert_table, scale

# The scale of the colours, as wide as a figure.
_SCALE = f'<div class="figures two"><div>{scale()}</div></div>'
COLOURED = 600  # tokens of each domain that are shown in colours
_MOST_NUMBERS = 16  # experts for which a map of pairs of experts has numbers
_CLASSES = {HOLDS: " holds", FAILS: " fails"}
_MEASURES = {
  "kind": "kind",
  "token": "token",
  "domain": "domain",
  "lexical": "token, given the domain",
  "topical": "domain, given the token",
}


def analysis_page(
  title: str, facts: Sequence[str], stacks: Mapping[str, tuple[Recorded, Mapping[str, Any]]]
) -> str:
  """Returns the page as an HTML document.

  Args:
    title: The name of the run.
    facts: What was analysed, in a few words each.
    stacks: For each stack of layers, "encoder" or "decoder", its tokens and what
      `results.analyse` returned. A model without an encoder has the decoder only.
  """
  body = (
    f"<h1>{html.escape(title)}: experts</h1>"
    f'<p class="meta">{" · ".join(html.escape(fact) for fact in facts)}</p>'
  )
  for stack, (recorded, result) in stacks.items():
    head = f"<h2>The {stack}</h2>" if len(stacks) > 1 else ""
    body += head + "".join(section(recorded, result) for section in _SECTIONS)
  return document(f"{title}: experts", f"{body}<script>{SCRIPT}</script>")


def _findings(recorded: Recorded, result: Mapping[str, Any]) -> str:
  """Returns the two findings with their verdicts."""
  text = ""
  for name, sentence in sentences(result).items():
    verdict = result["findings"][name]["verdict"]
    text += (
      f'<div class="finding{_CLASSES.get(verdict, "")}"><b>{CLAIMS[name]}: {verdict}.</b> '
      f"{html.escape(sentence[0].upper() + sentence[1:])}</div>"
    )
  return text


def _explained(recorded: Recorded, result: Mapping[str, Any]) -> str:
  """Returns the table of what kind, token and domain explain of the choice of expert."""
  head = "".join(f"<th>{words}</th>" for words in _MEASURES.values())
  rows = ""
  for name, layer in zip(result["layers"], result["explained"], strict=True):
    cells = "".join(
      _beside_chance(layer[m]["value"], layer[m]["chance"], layer[m]["half_width"])
      for m in _MEASURES
    )
    rows += f"<tr><td>{html.escape(name)}</td><td>{layer['expert_entropy']:.2f}</td>{cells}</tr>"
  charts = ""
  if len(result["layers"]) > 2:
    lines = [
      _line(words, result, [layer[m]["value"] for layer in result["explained"]], i)
      for i, (m, words) in enumerate(_MEASURES.items())
    ]
    chart = line_chart("Explained share", lines, x_label="layer")
    charts = f'<div class="figures two">{chart}</div>'
  return (
    '<h2>What explains the expert</h2><p class="lead">The share of the entropy of the first-choice '
    "expert (in nats) that is explained by the token's kind, by its identity and by its domain, "
    "then by its identity within a domain (lexical) and by its domain for a given identity "
    "(topical), in percent ± half of the 95 % interval. In parentheses: chance, with shuffled "
    "experts or, for domains, with rows of text dealt to the domains at random.</p>"
    f'<div class="wide"><table><tr><th>layer</th><th>entropy</th>{head}</tr>{rows}</table></div>'
    f"{charts}"
  )


def _sharpness(recorded: Recorded, result: Mapping[str, Any]) -> str:
  """Returns the table and, for three layers and more, the charts of the router's sharpness."""
  sharp, uniform = result["sharpness"], math.log(recorded.num_experts)
  rows = "".join(
    f"<tr><td>{html.escape(name)}</td><td>{_plus_minus(*entropy, '.3f')}</td>"
    f"<td>{_plus_minus(*top, '.3f')}</td></tr>"
    for name, entropy, top in zip(
      result["layers"],
      zip(sharp["entropy"], sharp["entropy_half_width"], strict=True),
      zip(sharp["top"], sharp["top_half_width"], strict=True),
      strict=True,
    )
  )
  charts = ""
  if len(result["layers"]) > 2:
    for title, name, level in (
      ("Router entropy", "entropy", Level("ln E", uniform)),
      ("Largest probability", "top", Level("1/E", 1 / recorded.num_experts)),
    ):
      lines = [_line(title, result, sharp[name], 0)]
      charts += line_chart(title, lines, levels=[level], bottom=0.0, x_label="layer")
  return (
    '<h2>Sharpness by layer</h2><p class="lead">The mean entropy of the probabilities of the '
    "router, and the mean of the largest one. A router that does not decide has ln E = "
    f"{uniform:.3f} nats and 1/E = {1 / recorded.num_experts:.3f}.</p>"
    f'<div class="wide"><table><tr><th>layer</th><th>entropy (nats)</th>'
    f"<th>largest probability</th></tr>{rows}</table></div>"
    + (f'<div class="figures two">{charts}</div>' if charts else "")
  )


def _line(label: str, result: Mapping[str, Any], values: Sequence[float], index: int) -> Line:
  """Returns a line over the layers of the model."""
  places = [float(name.rpartition(" ")[2]) for name in result["layers"]]
  return Line(label, np.array(places), np.array(values, float), series_colour(index))


def _repetition(recorded: Recorded, result: Mapping[str, Any]) -> str:
  """Returns the table of how often successive tokens have the same expert."""
  first, either = result["uniform_repetition"]
  has_two = any(domain["either"] is not None for layer in result["repetition"] for domain in layer)
  kinds = [("first", "first choice")] + [("either", "first or second")] * has_two
  head = "".join(
    f"<th>{html.escape(domain)}{f', {words}' if has_two else ''}</th>"
    for domain in result["domains"]
    for _, words in kinds
  )
  rows = ""
  for name, layer in zip(result["layers"], result["repetition"], strict=True):
    cells = "".join(
      _beside_chance(domain[key], domain[f"{key}_shuffled"]) for domain in layer for key, _ in kinds
    )
    rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
  two = f" ({either:.1%} that two tokens share one of their first two choices)" * has_two
  return (
    '<h2>Repetition</h2><p class="lead">How often a token has the expert of the token before it, '
    f"in percent. If experts were drawn uniformly, it would be {first:.1%}{two}. In parentheses: "
    "the same tokens in random order, in which an uneven load repeats experts, too.</p>"
    f'<div class="wide"><table><tr><th>layer</th>{head}</tr>{rows}</table></div>'
  )


def _tables(recorded: Recorded, result: Mapping[str, Any]) -> str:
  """Returns where the tokens of each domain and of each kind go."""
  if recorded.num_experts > MOST_EXPERTS:
    return ""
  text = ""
  for title, key, names in (
    ("Domains by expert", "by_domain", result["domains"]),
    ("Kinds of tokens by expert", "by_kind", result["kinds"]),
  ):

    def figure(layer, key=key, names=names):
      counts = np.array(result[key][layer])
      table = expert_table(f"{key.removeprefix('by_')} (tokens)", names, counts)
      caption = html.escape(result["layers"][layer])
      return f"<figure><figcaption>{caption}</figcaption>{table}</figure>"

    text += (
      f'<h2>{title}</h2><p class="lead">The percentage of the tokens that has each first-choice '
      "expert. White is the expert's share of all tokens, brown is more.</p>"
      f"{_SCALE}{_some(len(result['layers']), figure)}"
    )
  return text


def _kind_entropy(recorded: Recorded, result: Mapping[str, Any]) -> str:
  """Returns the table of the entropy of the experts of each kind of token."""
  head = "".join(f"<th>{html.escape(name)}</th>" for name in result["layers"])
  rows = ""
  for i, (kind, tokens) in enumerate(zip(result["kinds"], result["tokens_by_kind"], strict=True)):
    values = [layer[i] for layer in result["entropy_by_kind"]]
    if tokens:
      cells = "".join(f"<td>{'-' if v is None else f'{v:.2f}'}</td>" for v in values)
      rows += f"<tr><td>{kind} ({tokens})</td>{cells}</tr>"
  return (
    '<h2>How narrowly a kind is routed</h2><p class="lead">The entropy of the first-choice experts '
    "of the tokens of a kind, in nats: 0 if one expert has them all, and "
    f"{math.log(recorded.num_experts):.2f} if all experts have as many.</p>"
    f'<div class="wide"><table><tr><th>kind (tokens)</th>{head}</tr>{rows}</table></div>'
  )


def _typical(recorded: Recorded, result: Mapping[str, Any]) -> str:
  """Returns the tokens that say most about each expert."""

  def figure(layer):
    rows = "".join(
      f'<tr><td>{expert}</td><td class="token">'
      + "".join(f"<code>{visible(text)}</code>" for text in texts)
      + "</td></tr>"
      for expert, texts in enumerate(result["typical"][layer])
    )
    return (
      f"<div><h3>{html.escape(result['layers'][layer])}</h3>"
      f'<table><tr><th>expert</th><th class="token">tokens</th></tr>{rows}</table></div>'
    )

  return (
    '<h2>Typical tokens</h2><p class="lead">The tokens that each expert gets more often than other '
    "tokens, those first that say most about the expert. Rare tokens of a kind count together.</p>"
    f"{_some(len(result['layers']), figure)}"
  )


def _coactivation(recorded: Recorded, result: Mapping[str, Any]) -> str:
  """Returns maps of which expert follows which in the next layer with experts."""
  pairs = result["coactivation"]
  if not pairs:
    return ""

  def figure(i):
    counts = np.array(pairs[i]["counts"])
    here, there = (html.escape(name) for name in result["layers"][i : i + 2])
    if recorded.num_experts <= _MOST_NUMBERS:
      names = [str(expert) for expert in range(recorded.num_experts)]
      picture = expert_table("expert (tokens)", names, counts)
    else:
      picture = _picture(counts, f"{here} → {there}")
    return (
      f"<figure><figcaption>{here} (rows) → {there} (columns)</figcaption>"
      f'<p class="note">The expert explains {pairs[i]["explained"]:.1%} of the next one; with '
      f"shuffled experts it would be {pairs[i]['chance']:.1%}.</p>{picture}</figure>"
    )

  return (
    '<h2>From layer to layer</h2><p class="lead">Which first choices follow those of the layer '
    "before: white is as often as if the layers were independent, brown is more often.</p>"
    f"{_SCALE}{_some(len(pairs), figure)}"
  )


def _picture(counts: np.ndarray, title: str) -> str:
  """Returns a map of pairs of experts without numbers."""
  return (
    f'<img src="{png(load_pixels(relative(counts)))}" alt="{title}" '
    'style="width:100%;max-width:480px;image-rendering:pixelated">'
  )


def _churn(recorded: Recorded, result: Mapping[str, Any]) -> str:
  """Returns the table of tokens whose first choice differs at the other checkpoint."""
  if result["churn"] is None:
    return ""
  head = "".join(f"<th>{html.escape(d)}</th>" for d in result["domains"])
  rows = ""
  for name, layer in zip(result["layers"], result["churn"], strict=True):
    cells = "".join(_beside_chance(d["changed"], d["chance"]) for d in layer)
    rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
  return (
    '<h2>Churn</h2><p class="lead">The percentage of tokens whose first choice differs between '
    "the two checkpoints. In parentheses: if the choices of the two were independent.</p>"
    f'<div class="wide"><table><tr><th>layer</th>{head}</tr>{rows}</table></div>'
  )


def _text(recorded: Recorded, result: Mapping[str, Any]) -> str:
  """Returns text of each domain, coloured by the expert in the first, middle and last layer."""
  panels, pages = "", []
  for d, domain in enumerate(result["domains"]):
    shown = np.flatnonzero(recorded.domain == d)[:COLOURED]
    pieces = [recorded.pieces[i] for i in shown]
    pages.append(recorded.first[:, shown].tolist())
    starts = np.diff(recorded.row[shown], prepend=recorded.row[shown][:1]) != 0
    shown_in = "".join(
      f'<div><p class="note">{html.escape(result["layers"][layer])}</p>'
      + tokens_page(
        d, pieces, recorded.first[layer, shown], recorded.num_experts, layer=layer, starts=starts
      )
      + "</div>"
      for layer in first_middle_last(len(result["layers"]))
    )
    panels += f'<h3>{html.escape(domain)}</h3><div class="panels">{shown_in}</div>'
  data = {"experts": recorded.num_experts, "layers": list(result["layers"]), "pages": pages}
  return (
    '<h2>Text by expert</h2><p class="lead">Tokens on the colour of their first-choice expert in '
    "the first, middle and last layer with experts, as in Mixtral's Figure 8. · is a space, ↵ a "
    "line's end, → a tab, ◆ a special token, ◌ a part of a character; text is left out at ⋯. Point "
    "at a token for its experts in all layers; click an expert to see only its tokens.</p>"
    + coloured(f"{chips(recorded.num_experts)}{panels}", data)
  )


def first_middle_last(count: int) -> list[int]:
  """Returns the first, the middle and the last of `count` indices, each once."""
  return sorted({0, (count - 1) // 2, count - 1}) if count else []


def _some(count: int, figure: Callable[[int], str]) -> str:
  """Returns the first, middle and last of `count` figures, and the others behind a fold."""
  shown = first_middle_last(count)
  text = f'<div class="figures two">{"".join(map(figure, shown))}</div>'
  others = [i for i in range(count) if i not in shown]
  if others:
    rest = "".join(map(figure, others))
    text += (
      f"<details><summary>{len(others)} more</summary>"
      f'<div class="figures two">{rest}</div></details>'
    )
  return text


def _beside_chance(value: float | None, chance: float | None, width: float | None = None) -> str:
  """Returns a cell with a share in percent, half of its interval if any, and (its chance)."""
  if value is None or chance is None:
    return "<td>-</td>"
  interval = "" if width is None else f" ± {100 * width:.1f}"
  return f'<td>{100 * value:.1f}{interval} <span class="note">({100 * chance:.1f})</span></td>'


def _plus_minus(value: float, half_width: float | None, form: str) -> str:
  """Returns a value with half of its interval if there is one."""
  return f"{value:{form}}" + ("" if half_width is None else f" ± {half_width:{form}}")


_SECTIONS: tuple[Callable[[Recorded, Mapping[str, Any]], str], ...] = (
  _findings,
  _text,
  _explained,
  _sharpness,
  _repetition,
  _tables,
  _kind_entropy,
  _typical,
  _coactivation,
  _churn,
)
