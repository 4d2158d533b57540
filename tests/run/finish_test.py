"""The results that a run writes at its end, for a model of a few thousand weights."""

import json
import math
import os

import jax
import numpy as np
import pytest
import tiny

from moe_jax import assembly, data, sharding
from moe_jax.data.documents import InMemory, Subset
from moe_jax.data.options import DataOptions
from moe_jax.generation import decode
from moe_jax.run import finish, loop
from moe_jax.training import evaluate, optimizers, workdir
from moe_jax.training import state as states

pytestmark = pytest.mark.smoke
INFO = {
  "config": "configs/tiny.py",
  "command": "train",
  "steps": 6,
  "tokens": 768,
  "wall_seconds": 1.5,
}


def parts(directory, **changes):
  """Returns the arguments of `finish.finish` for an untrained model, without `run_info`."""
  config = tiny.config(directory, **changes)
  place = directory / "run"
  place.mkdir()
  data_options, rules = DataOptions.of(config.data), dict(config.sharding)
  tokenizer, sources = data.tokenizer_of(data_options), data.make_sources(data_options)
  mesh = sharding.make_mesh(dict(config.mesh))
  model = assembly.model(config, tokenizer.size, mesh)
  optimizer, _ = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), config.train.steps
  )
  with jax.set_mesh(mesh):
    _, make = states.create(
      mesh, model, optimizer, 0, data_options.seq_len, config.train.batch_size
    )
    state = make()
  eval_fn = evaluate.make_eval(
    data_options, config.train.batch_size, rules, model, mesh, tokenizer, sources
  )
  return config, place, model, state, tokenizer, sources, mesh, eval_fn


def test_leaves_results_routing_report_and_a_table(tmp_path, capsys):
  # Catches a score of only a part of the validation split, a page whose experts do not match its
  # tokens, and a missing file.
  other = {"config": "configs/dense_baseline.py:quickstart", "bits_per_byte": {}}
  (tmp_path / "other.json").write_text(json.dumps(other))
  arguments = parts(tmp_path, report__compare=str(tmp_path / "other.json"))
  source = arguments[5][0]
  other["bits_per_byte"][source.name] = 7.5
  (tmp_path / "other.json").write_text(json.dumps(other))
  finish.finish(*arguments, INFO)
  place, printed = arguments[1], capsys.readouterr().out

  results = json.loads((place / "results.json").read_text())
  assert INFO.items() <= results.items()
  size = sum(map(len, source.documents("validation")))
  nats = results["loss"][source.name] * arguments[-1](arguments[3], 0)[source.name]["tokens"]
  assert results["bits_per_byte"][source.name] == pytest.approx(nats / math.log(2) / size)
  assert list(results["ladder"][source.name]) == [
    "unigram",
    "bigram",
    "trigram",
    "4-gram",
    "5-gram",
    "lzma",
  ]
  assert (
    results["parameters"]["activated"] < results["parameters"]["total"]
    and results["versions"]["jax"]
  )
  assert results["compare"] == {
    "label": "dense baseline",
    "about": "dense baseline: what configs/dense_baseline.py:quickstart reached, read from "
    f"{tmp_path / 'other.json'} (report.compare).",
    "bits_per_byte": {source.name: 7.5},
    "other_data": [source.name],
  }

  routing = json.loads((place / "routing.json").read_text())
  (page,) = routing["pages"]
  assert routing["num_experts"] == 4 and routing["layers"] == [0] and len(page["experts"]) == 1
  # The layer is top-2, so that each token has a second choice, which is not the first.
  assert all(a != b < 4 for a, b in zip(page["experts"][0], page["second"][0], strict=True))
  # One batch has fewer tokens than a page.
  assert len(page["pieces"]) == len(page["experts"][0]) == 4 * 32
  text = source.documents("validation")[0].decode()
  assert page["pieces"][0] is None and "".join(page["pieces"][1:21]) == text[:20]
  assert set(page["experts"][0]) <= {0, 1, 2, 3}

  assert "Held-out text by expert" in (place / "report.html").read_text()
  # On a busy machine, long work says in between how long it has taken.
  lines = [line for line in printed.splitlines() if not line.endswith("so far")]
  table = "\n".join(lines).strip().splitlines()
  head, line, note, about = table[:4]
  assert (
    head.split()
    == "bits per byte this run dense baseline unigram bigram trigram 4-gram 5-gram LZMA".split()
  )
  assert (
    line.startswith(source.name) and "7.500*" in line and note.startswith("* on another version")
  )
  assert about == results["compare"]["about"]
  assert (
    str(place / "report.html") in printed
    and 0 < len(results["sample"].encode("utf-8", "replace")) <= 600
  )


def test_dense_run_has_no_routing(tmp_path):
  # Catches a dense run that leaves the page of an earlier run, or an empty page, in its workdir.
  arguments = parts(tmp_path, model__moe__num_experts=0)
  (arguments[1] / "routing.json").write_text("{}")
  finish.finish(*arguments, INFO)
  assert not (arguments[1] / "routing.json").exists()
  assert "Routers" not in (arguments[1] / "report.html").read_text()


def test_sample_is_the_same_each_time_and_made_of_bytes(tmp_path):
  # Catches a seed that is taken from the clock, a crash if a sequence (24 tokens) is not a whole
  # number of routing groups (16 tokens), and a text that ends where the first window does.
  # It also catches a program for each piece of the text.
  _, _, model, state, tokenizer, *_ = parts(tmp_path, model__moe__group_size=16, data__seq_len=24)
  programs = decode._all_at_once._cache_size()
  one, two = (finish.sample_text(model, {"params": state.params}, tokenizer, 24) for _ in range(2))
  assert one == two and len(one.encode("utf-8", "surrogateescape")) >= finish.SAMPLE_BYTES
  assert decode._all_at_once._cache_size() == programs + 1


def test_the_pieces_of_a_sample():
  # Worked by hand: a later piece of a window of 24 reads at least 7 tokens, and 7 + 18 - 1 = 24.
  # Catches a position beyond the window, and a piece that draws more than is left.
  assert finish._pieces(45, 128) == [(1, 45)]
  assert finish._pieces(200, 128) == [(1, 128), (57, 72)]
  assert finish._pieces(60, 24) == [(1, 24), (7, 18), (7, 18)]
  assert finish._pieces(3, 1) == [(1, 1), (1, 1), (1, 1)]


def test_a_run_that_has_ended_is_shown_at_once(tmp_path, capsys, monkeypatch):
  # Catches a finished run that reads data and evaluates again, one whose report is missing or cut
  # and stays so, and one whose results are damaged and are shown.
  config, place, *others = parts(tmp_path, model__moe__num_experts=0)
  workdir.claim(place, config)
  workdir.note_start(place, config, {"data": {}, "tokenizer": ""}, {})
  finish.finish(config, place, *others, INFO)
  whole = (place / "report.html").read_text()
  printed = capsys.readouterr().out
  table = printed[printed.index("bits per byte") :].splitlines()[:2]

  def begins(*_):
    raise InterruptedError

  monkeypatch.setattr(data, "make_sources", begins)
  for damage in (lambda path: None, lambda path: path.unlink(), lambda path: os.truncate(path, 99)):
    damage(place / "report.html")
    assert loop.train(config, place, {"config": "tiny", "command": ""})
    shown = capsys.readouterr().out
    assert "has finished its 6 steps" in shown and all(line in shown for line in table)
    assert (place / "report.html").read_text() == whole
  (place / "results.json").write_text("{}")
  with pytest.raises(InterruptedError):
    loop.train(config, place, {"config": "tiny", "command": ""})


def test_a_model_that_cannot_decode_says_so(tmp_path, capsys):
  # Catches a crash at the end of a run whose routing looks ahead, and a sample of another model.
  arguments = parts(
    tmp_path, model__moe__router__name="expert_choice", model__moe__allow_noncausal_routing=True
  )
  assert finish.finish(*arguments, INFO)["sample"] == ""
  assert "no sample: model.moe.router.name='expert_choice'" in capsys.readouterr().out


def test_large_or_empty_sources_get_no_ladder(tmp_path):
  # Catches an hour of n-grams at the end of a run on C4, and a division by a length of 0.
  def subset(texts):
    text, ends = np.frombuffer(b"".join(texts), np.uint8), np.cumsum([len(t) for t in texts])
    return Subset(InMemory([str(i) for i in range(len(texts))], text, ends), range(len(texts)))

  options = DataOptions(validation_fraction=0.1, cache_dir=str(tmp_path))

  def source(train, validation):
    return data.Source(
      "s", f"{train}{validation}", {"train": subset(train), "validation": subset(validation)}
    )

  assert finish.source_ladder(options, source([b"12345", b"123456"], [b"1"]), 10) is None
  assert finish.source_ladder(options, source([b"12345"], []), 10) is None
  assert finish.source_ladder(options, source([b"12345"], [b""]), 10) is None
  assert finish.source_ladder(options, source([b"1"], [b"1"]), 0) is None
  assert finish.source_ladder(options, source([b"12345", b"12345"], [b"1"]), 10)["unigram"] > 0


@pytest.mark.parametrize(
  "content",
  [
    None,
    "",
    "[]",
    "{}",
    '{"config": "c", "bits_per_byte": null}',
    '{"config": "c", "bits_per_byte": {"a": "x"}}',
  ],
)
def test_comparison_that_cannot_be_read_is_told_and_left_out(tmp_path, capsys, content):
  # Catches a finished run that fails because there is no file to compare with.
  path = tmp_path / "results.json"
  if content is not None:
    path.write_text(content)
  assert finish.comparison(str(path), {"bits_per_byte": {"a": 1.0}, "data": {}}) == {}
  assert "report.compare" in capsys.readouterr().out
  assert finish.comparison("", {"bits_per_byte": {"a": 1.0}, "data": {}}) == {}


def test_a_comparison_needs_a_source_that_both_have(tmp_path, capsys):
  # Catches a column of dashes beside the user's own data, and a sentence without the steps.
  path = tmp_path / "other.json"
  path.write_text('{"config": "configs/x_y.py:z", "steps": 1200, "bits_per_byte": {"a": 2.5}}')
  assert finish.comparison(str(path), {"bits_per_byte": {"mine": 1.0}, "data": {}}) == {}
  results = {"bits_per_byte": {"a": 1.0, "mine": 3.0}, "data": {}, "ladder": {}}
  results |= finish.comparison(str(path), results)
  assert finish.table(results).splitlines() == [
    "bits per byte  this run    x y",
    "a                 1.000  2.500",
    "mine              3.000      -",
    f"x y: what configs/x_y.py:z reached after 1,200 steps, read from {path} (report.compare).",
  ]
  assert capsys.readouterr().out == ""


def test_table_without_ladder_or_value():
  # Catches a format that fails for NaN or for a source without a ladder.
  results = {
    "bits_per_byte": {"a": math.nan, "bb": 2.0},
    "ladder": {"bb": {"unigram": 4.0, "lzma": 1.0}},
  }
  assert finish.table(results).splitlines() == [
    "bits per byte  this run  unigram   LZMA",
    "a                     -        -      -",
    "bb                2.000    4.000  1.000",
  ]
