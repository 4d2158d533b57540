"""Tests that the report is self-contained, escaped, and can be built of any workdir."""

import html.parser
import json
import re

import pytest
import synthetic

import moe_jax.report
from moe_jax.errors import ConfigError
from moe_jax.report import write_report

pytestmark = pytest.mark.unit


class Page(html.parser.HTMLParser):
  """Collects the elements with their attributes, and the text of each kind of element.

  It fails on unbalanced tags.
  """

  VOID = {"meta"}

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.elements, self.open, self.text = [], [], {}
    self.feed(text)
    self.close()
    assert not self.open, f"not closed: {self.open}"

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing that is open"

  def handle_data(self, data):
    tag = self.open[-1] if self.open else ""
    self.text[tag] = self.text.get(tag, "") + data


def report(path):
  """Writes the report of a workdir and returns its text, the parsed page, and its headings."""
  made = write_report(path)
  assert made == path / "report.html"
  text = made.read_text(encoding="utf-8")
  return text, Page(text), re.findall(r"<h2>(.*?)</h2>", text)


ALL = [
  "Result",
  "Loss",
  "Optimization",
  "Load of the experts",
  "Routers",
  "Held-out text by expert",
  "Kinds of tokens by expert",
  "Sample",
  "Configuration",
]


def test_moe_report_has_every_section_and_needs_nothing_else(tmp_path):
  # Catches a section that is missing, a link to another host, and an attribute or a style that
  # loads another file.
  text, page, headings = report(synthetic.write_workdir(tmp_path / "run"))
  assert headings == ALL
  assert len(text) < 2_000_000
  assert "http" not in text and "@import" not in text and "url(" not in text
  for tag, attributes in page.elements:
    assert tag not in {"link", "iframe", "object", "embed", "base", "img"}
    for name in ("src", "href", "xlink:href", "data", "action"):
      assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)


def test_text_of_the_run_is_escaped(tmp_path):
  # Catches a token, a name of a source, a sample or a config that is written without escaping.
  text, page, _ = report(synthetic.write_workdir(tmp_path / "run"))
  scripts = [attributes for tag, attributes in page.elements if tag == "script"]
  assert scripts == [{"type": "application/json"}, {}, {}]
  assert "<script>alert" not in text and "<!--" not in text
  assert synthetic.HOSTILE.strip("\n") in page.text["pre"]
  assert "embedded:prose<b>" in page.text["h3"]


def test_result_table_marks_what_is_beaten(tmp_path):
  # Catches marks on the wrong figures: 2.0 is below 2.125, 4.8, 3.7, 2.8, 2.4 and 2.2, and above
  # 1.9.
  text, _, _ = report(synthetic.write_workdir(tmp_path / "run"))
  row = re.search(r"<tr><td>embedded:prose</td>.*?</tr>", text).group()
  assert re.findall(r"<td( class=[\w\"]+)?>([\d.]+)", row) == [
    (' class="run"', "2.000"),
    (" class=beaten", "2.125"),
    (" class=beaten", "4.800"),
    (" class=beaten", "3.700"),
    (" class=beaten", "2.800"),
    (" class=beaten", "2.400"),
    (" class=beaten", "2.200"),
    ("", "1.900"),
  ]
  assert "dense baseline" in text and "LZMA" in text


@pytest.mark.parametrize("experts, layers", [(1, 1), (16, 3), (64, 12), (130, 2)])
def test_any_number_of_experts(tmp_path, experts, layers):
  # Catches a palette that has too few colours, and a page whose size grows beyond the limit with
  # experts x layers x steps.
  text, _, headings = report(
    synthetic.write_workdir(tmp_path / "run", experts=experts, layers=layers, steps=2000)
  )
  # A table of more experts could not be read.
  wanted = [name for name in ALL if experts <= 64 or not name.startswith("Kinds")]
  assert headings == wanted and len(text) < 2_000_000


def test_dense_run_has_no_word_about_experts(tmp_path):
  # Catches empty charts of experts, which a dense run does not have.
  text, _, headings = report(synthetic.write_workdir(tmp_path / "run", experts=0))
  assert headings == ["Result", "Loss", "Optimization", "Sample", "Configuration"]
  assert "dense</p>" in text


def test_run_stopped_early_says_so(tmp_path):
  # Catches a failure for half a line of metrics, and figures of an unfinished run that are shown as
  # final.
  text, _, headings = report(synthetic.write_workdir(tmp_path / "run", stop=50))
  assert "not finished: step 50 of 100" in text and "evaluation batches of step 40" in text
  assert headings == [
    "Result",
    "Loss",
    "Optimization",
    "Load of the experts",
    "Routers",
    "Configuration",
  ]


def test_not_finite_values_leave_gaps_and_are_counted(tmp_path):
  # Catches NaN in a path, which hides the whole line, and an exception for such values.
  text, _, _ = report(synthetic.write_workdir(tmp_path / "run", nan_from=60))
  assert "21 values not finite" in text
  drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
  assert not re.search(r"\b(nan|inf)", drawn, re.I)
  text, _, _ = report(synthetic.write_workdir(tmp_path / "all", nan_from=0))
  assert "values not finite" in text


@pytest.mark.parametrize(
  "name", ["config.json", "meta.json", "results.json", "routing.json", "metrics.jsonl"]
)
@pytest.mark.parametrize(
  "damage",
  [
    "",
    "{",
    "[1, 2]",
    "{}",
    '{"pages": [{"experts": [[1]], "pieces": []}], "model": {}}',
    '{"pages": 1, "model": 1, "starts": 1, "ladder": 1, "bits_per_byte": 1, "compare": 1, '
    '"parameters": 1, "train": 1}',
    '{"step": 2, "kind": "train", "loss": {}, "moe/load": 3, "moe/entropy": [[[1]]], '
    '"learning_rate": [1]}',
  ],
)
def test_missing_or_damaged_files_do_not_kill_it(tmp_path, name, damage):
  # Catches a reader that relies on the structure of a file.
  path = synthetic.write_workdir(tmp_path / "run", steps=20)
  (path / name).write_text(damage) if damage else (path / name).unlink()
  report(path)


def test_failure_keeps_the_old_report(tmp_path, monkeypatch):
  # Catches a report that is opened for writing before its content is complete, and a temporary file
  # that is left behind.
  path = synthetic.write_workdir(tmp_path / "run", steps=20)
  (path / "report.html").write_text("old")
  before = sorted(p.name for p in path.iterdir())

  def fails(_):
    raise RuntimeError("no page")

  monkeypatch.setattr(moe_jax.report, "page", fails)
  with pytest.raises(RuntimeError):
    write_report(path)
  assert (path / "report.html").read_text() == "old"
  assert sorted(p.name for p in path.iterdir()) == before


def test_no_workdir(tmp_path):
  # Catches an empty report for a mistyped folder.
  for path in (tmp_path, tmp_path / "missing"):
    with pytest.raises(ConfigError, match="workdir"):
      write_report(path)
  assert not list(tmp_path.iterdir())


def test_results_alone_suffice(tmp_path):
  # Catches a report that needs config.json.
  (tmp_path / "results.json").write_text(json.dumps({"bits_per_byte": {"a": 1.0}}))
  assert report(tmp_path)[2] == ["Result"]
