"""Tests the section that shows held-out text by expert."""

import json
import re

import pytest

from moe_jax.report.routing_page import routing_section, visible

pytestmark = pytest.mark.unit


def page(**changes):
  return {
    "num_experts": 3,
    "pages": [
      {"source": "s", "pieces": [None, "<b>", " ", "\n"], "experts": [[0, 1, 1, 3], [2, 2, 2, 0]]}
    ],
  } | changes


def test_what_cannot_be_seen_is_shown():
  # Catches control characters that are not shown, and text that is not escaped.
  assert visible(None) == "◆" and visible("") == "◌"
  assert visible(" a\tb\n") == "·a→b↵\n" and visible("\x00\u202e") == "\\x00\\x202e"
  assert visible("<i>&") == "&lt;i&gt;&amp;"


def test_tokens_carry_their_expert_of_the_first_layer():
  # Catches experts that are shifted against their tokens, and a token without an expert that has
  # the colour of one.
  text = routing_section(page(), ["layer 1", "layer 3"])
  tokens = re.search(r'<div class="page" data-text="0">(.*?)</div>', text, re.S).group(1)
  assert re.findall(r'<i class="(\w+)"( w)?>(.*?)</i>', tokens, re.S) == [
    ("e0", "", "◆"),
    ("e1", "", "&lt;b&gt;"),
    ("e1", " w", "·"),
    ("none", " w", "↵\n"),
  ]


def test_shares_are_of_the_tokens_that_have_an_expert():
  # Catches shares that do not add up to 100 %.
  text = routing_section(page(), ["layer 1", "layer 3"])
  assert re.findall(r"<span>([\d.]+) %</span>", text) == ["33.3", "66.7", "0.0"]


def test_script_gets_every_layer():
  # Catches a button of a layer for which there is no data.
  text = routing_section(page(), ["layer 1", "<3>"])
  data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text).group(1))
  assert data == {
    "experts": 3,
    "layers": ["layer 1", "<3>"],
    "pages": [[[0, 1, 1, 3], [2, 2, 2, 0]]],
  }
  assert text.count("data-layer=") == 2 and "<3>" not in text


def test_second_choices_make_a_map_if_every_page_has_them():
  # Catches choices that are not those of the shown tokens, and a page of an older run, or a damaged
  # one, that ends the report.
  one = page()["pages"][0]
  with_second = one | {"second": [[1, 2, 0, 3], [3, 3, 3, 3]]}
  head, layers = "Experts that are chosen together", ["layer 1", "layer 3"]
  text = routing_section(page(pages=[with_second]), layers)
  assert head in text and "<td>0 (2)</td>" in text[text.index(head) :]
  for pages in ([one], [with_second, one], [one | {"second": [[1]]}], [one | {"second": "x"}]):
    text = routing_section(page(pages=pages), layers)
    assert "Held-out text" in text and head not in text


@pytest.mark.parametrize(
  "routing",
  [
    {},
    {"num_experts": 3},
    page(num_experts="3"),
    page(num_experts=0),
    page(pages=[]),
    page(pages=[3]),
    page(pages=[{"source": "s", "pieces": ["a"], "experts": [[0, 1], [0, 1]]}]),
    page(pages=[{"source": "s", "pieces": ["a"], "experts": [[-1], [0]]}]),
    page(pages=[{"source": "s", "pieces": [], "experts": [[], []]}]),
  ],
)
def test_what_does_not_fit_is_left_out(routing):
  # Catches a failure for a routing.json that is truncated or of another version.
  assert routing_section(routing, ["layer 1", "layer 3"]) == ""
