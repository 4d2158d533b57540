"""The style sheet and the scripts of the report, which are all written into the page."""

import json
from typing import Any


def script_safe(data: Any) -> str:
  """Returns `data` as JSON that cannot close the script element that contains it."""
  return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


CSS = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
  color: #1a1a1a; background: #fff; max-width: 1240px; margin: 0 auto; padding: 28px 32px 60px; }
h1 { font-size: 27px; margin: 0; }
h2 { font-size: 20px; margin: 40px 0 4px; border-top: 1px solid #ddd; padding-top: 18px; }
h3 { font-size: 15px; margin: 22px 0 6px; } h3, figcaption { overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 120ch; }
.lead, .note, .meta { color: #555; } .meta { max-width: none; }
.note { font-size: 13px; margin: 0; }
.warn { color: #8a1c00; font-size: 13px; margin: 0; }
.banner { background: #fff4e5; border-left: 4px solid #d55e00; padding: 8px 12px;
  max-width: none; margin: 14px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr));
  gap: 10px; margin: 18px 0 6px; }
.tiles div { background: #f5f6f8; border-radius: 6px; padding: 8px 12px; }
.tiles b { display: block; font-size: 19px; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.tiles span { font-size: 12.5px; color: #555; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 12px 0 6px; }
.wide { overflow-x: auto; }
th, td { padding: 6px 14px; text-align: right; border-bottom: 1px solid #e4e4e4;
  white-space: nowrap; }
th { font-weight: 600; color: #444; border-bottom: 2px solid #bbb; }
th:first-child, td:first-child { text-align: left; }
table.events td:last-child, table.events th:last-child { text-align: left; white-space: normal; }
td.run { font-weight: 700; background: #f5f6f8; }
td.beaten { color: #006b4b; } td.beaten::before { content: "✓ "; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(350px, 100%), 1fr));
  gap: 24px 28px; margin-top: 12px; }
.figures.two { grid-template-columns: repeat(auto-fill, minmax(min(500px, 100%), 1fr)); }
figure { margin: 0; display: flex; flex-direction: column; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; display: block; margin-top: auto; padding-top: 4px; }
svg text { font-size: 12px; fill: #333; }
.grid { stroke: #e6e6e6; }
.axis { stroke: #888; fill: none; }
.level { stroke: #666; stroke-dasharray: 5 3; fill: none; }
.legend { font-size: 13px; line-height: 1.35; margin-top: 2px; }
.legend span { display: inline-block; margin-right: 14px; white-space: nowrap; }
.legend b { display: inline-block; width: 16px; height: 4px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
figure { position: relative; }
.tip { position: absolute; pointer-events: none; background: #fff; color: #1a1a1a;
  border: 1px solid #888; border-radius: 4px; padding: 3px 8px; font-size: 12.5px; line-height: 1.4;
  white-space: nowrap; z-index: 1; font-variant-numeric: tabular-nums; }
.tip b { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
.kinds td, .kinds th { text-align: center; padding: 4px 7px; }
.kinds td:first-child, .kinds th:first-child { text-align: left; }
.kinds .cell { color: #1a1a1a; min-width: 34px; }
.finding { border-left: 4px solid #999; background: #f5f6f8; padding: 8px 12px; margin: 12px 0; }
.finding.holds { border-color: #009e73; } .finding.fails { border-color: #d55e00; }
.panels { display: grid; gap: 14px 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(360px, 100%), 1fr)); }
.panels .page { max-height: 420px; overflow-y: auto; }
td.token, th.token { white-space: normal; overflow-wrap: anywhere; text-align: left; }
td.token code { background: #f0f1f3; color: #1a1a1a; border-radius: 3px; padding: 0 3px;
  margin-right: 4px; display: inline-block; white-space: pre; }
.scale { margin: 0 16px 0 50px; font-size: 12px; }
.scale i { display: block; height: 9px; border: 1px solid #ccc; }
.scale div { display: flex; justify-content: space-between; }
pre { background: #f5f6f8; border-radius: 6px; padding: 12px 14px;
  font: 13.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
button { font: inherit; font-size: 13px; border: 1px solid #bbb; border-radius: 4px;
  background: #fff; color: #1a1a1a; padding: 3px 9px; margin: 0 4px 5px 0; cursor: pointer;
  font-variant-numeric: tabular-nums; }
button[aria-pressed=true] { border-color: #1a1a1a; box-shadow: inset 0 0 0 1px #1a1a1a;
  font-weight: 600; }
.chips button { padding: 2px 3px; } .chips span { margin: 0 5px; }
.chips b { display: inline-block; min-width: 24px; text-align: center; border-radius: 3px;
  padding: 0 3px; }
.bar { display: flex; height: 12px; margin: 0 0 6px; } .bar i { min-width: 0; }
.pages { display: grid; gap: 0 28px;
  grid-template-columns: repeat(auto-fill, minmax(min(500px, 100%), 1fr)); }
.page { font: 13px/1.7 ui-monospace, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.page i, .bar i { font-style: normal; } .page i { padding: 1px 0 4px; color: #000; }
/* The first token of a stretch of text. */
.page i[s]::before { content: "⋯"; display: block; color: #888; }
.page i[w] { color: rgb(0 0 0 / 40%); }
.page i:hover { outline: 2px solid #000; outline-offset: 1px; }
.only .page i:not(.on) { background: none; box-shadow: none; color: #888; }
.only .bar i:not(.on) { opacity: .2; }
/* In the dark, charts and coloured text keep the light ground that their colours are chosen for. */
@media (prefers-color-scheme: dark) {
  body { color: #e3e5e8; background: #15171a; }
  .lead, .note, .meta, .tiles span, th { color: #a9adb3; } .warn { color: #ff9e80; }
  h2, th, td { border-color: #3a3e45; }
  .tiles div, td.run, pre, .finding { background: #22252a; } .banner { background: #3a2a15; }
  td.beaten { color: #5fd3a0; }
  figure, .page, .bar { background: #fff; color: #1a1a1a; border-radius: 6px; }
  figure th { color: #444; }
  figure { padding: 10px 10px 6px; } figure .note { color: #555; } .page { padding: 8px 10px; }
}
@media (max-width: 600px) { body { padding: 16px 14px 40px; } th, td { padding: 6px 8px; } }
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""

SCRIPT = """
document.querySelectorAll('.routing').forEach(root => {
const data = JSON.parse(root.querySelector('script').textContent);
const pages = [...root.querySelectorAll('.page')];
const layers = [...root.querySelectorAll('[data-layer]')];
const chips = [...root.querySelectorAll('[data-expert]')];
const tokens = pages.map(page => [...page.children]);
let layer = 0, only = null;
// A page shows the layer that a button has chosen, or has a layer of its own.
const experts = page => data.pages[page.dataset.text][page.dataset.at ?? layer];
function show() {
  const total = Array(data.experts).fill(0);
  let all = 0;
  pages.forEach((page, p) => {
    const count = Array(data.experts).fill(0), chosen = experts(page);
    tokens[p].forEach((token, i) => {
      const expert = chosen[i];
      const colour = expert < data.experts ? 'e' + expert : 'none';
      token.className = colour + (expert === only ? ' on' : '');
      if (expert < data.experts) { count[expert]++; total[expert]++; all++; }
    });
    [...page.previousElementSibling.children].forEach((part, e) => {
      part.style.flexGrow = count[e];
      part.className = 'e' + e + (e === only ? ' on' : '');
      part.title = `expert ${e}: ${(100 * count[e] / tokens[p].length).toFixed(1)} %`;
    });
  });
  root.classList.toggle('only', only !== null);
  layers.forEach((button, i) => button.setAttribute('aria-pressed', i === layer));
  chips.forEach((chip, e) => {
    const share = chip.querySelector('span');
    if (share) share.textContent = (100 * total[e] / Math.max(1, all)).toFixed(1) + ' %';
    chip.setAttribute('aria-pressed', e === only);
  });
}
layers.forEach((button, i) => button.onclick = () => { layer = i; show(); });
chips.forEach((chip, e) => chip.onclick = () => { only = only === e ? null : e; show(); });
pages.forEach((page, p) => page.onmouseover = event => {
  const i = tokens[p].indexOf(event.target);
  if (i < 0) return;
  event.target.title = JSON.stringify(event.target.textContent) + data.layers.map((name, l) => {
    const expert = data.pages[page.dataset.text][l][i];
    return `\\n${name}: ` + (expert < data.experts ? 'expert ' + expert : 'no expert');
  }).join('');
});
show();
});
"""

# Shows the values of a line chart at the place of the pointer. The chart's data are in its
# attribute data-chart, see `charts.line_chart`.
HOVER = """
document.querySelectorAll('svg[data-chart]').forEach(svg => {
  const chart = JSON.parse(svg.dataset.chart), figure = svg.parentElement;
  const tip = document.createElement('div');
  const mark = document.createElementNS(svg.namespaceURI, 'path');
  tip.className = 'tip'; tip.hidden = true; figure.append(tip);
  mark.setAttribute('class', 'axis'); svg.append(mark);
  const hide = () => { tip.hidden = true; mark.removeAttribute('d'); };
  svg.onpointerleave = hide;
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), [left, top, width, height] = chart.area;
    // The picture is scaled to the width of the page and stands at the bottom of its box.
    const scale = box.width / chart.size[0];
    const place = ((event.clientX - box.left) / scale - left) / width;
    const [low, high] = chart.range;
    if (place < -0.02 || place > 1.02) return hide();
    const wanted = low + place * (high - low);
    let nearest = null;
    chart.lines.forEach(line => line.x.forEach(x => {
      if (nearest === null || Math.abs(x - wanted) < Math.abs(nearest - wanted)) nearest = x;
    }));
    tip.textContent = `${chart.label} ${nearest}`;
    chart.lines.forEach(line => {
      const value = line.y[line.x.indexOf(nearest)];
      if (value === undefined || value === null) return;
      const row = document.createElement('div'), colour = document.createElement('b');
      colour.style.background = line.colour;
      row.append(colour, `${line.label}: ${value}`);
      tip.append(row);
    });
    const x = left + width * (nearest - low) / (high - low);
    mark.setAttribute('d', `M${x} ${top}v${height}`);
    tip.hidden = false;
    const right = x * scale + 12 + tip.offsetWidth < box.width;
    tip.style.left = (right ? x * scale + 12 : x * scale - 12 - tip.offsetWidth) + 'px';
    tip.style.top = (box.bottom - figure.getBoundingClientRect().top
      - (chart.size[1] - top) * scale) + 'px';
  };
});
"""
