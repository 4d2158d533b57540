import json

import pytest

from moe_jax import data
from moe_jax.commands import filter as command
from moe_jax.data.options import DataOptions

pytestmark = pytest.mark.unit


@pytest.fixture
def corpora(tmp_path):
  """Returns the flags of a corpus with good and bad documents, and of good examples."""
  good = [f"the cat sat on the mat and saw bird number {i}" for i in range(40)]
  bad = [f"click here click here {i * 'x'}" for i in range(40)]
  for name, texts in (("web", good[:20] + bad), ("good", good[20:])):
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
  return [f"--source=jsonl:{tmp_path}/web.jsonl", f"--curated=jsonl:{tmp_path}/good.jsonl"]


def test_good_documents_stay_and_the_result_is_a_source(corpora, tmp_path, capsys):
  # Catches a filter that keeps the wrong end, a table without counts, and a file that the trainer
  # cannot read.
  out = tmp_path / "out.jsonl"
  assert command.main(["filter", *corpora, "--alpha=3", "--fluency=0.65", f"--out={out}"]) == 0
  texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
  # Of the 21 documents that are left, at least one is bad, which the sampling may keep.
  good = [text.startswith("the cat") for text in texts]
  assert 5 < sum(good) <= 20 and len(good) - sum(good) <= 1
  printed = capsys.readouterr().out
  assert "60 -> 21" in printed and "ROC area" in printed and str(out) in printed
  (source,) = data.make_sources(DataOptions(sources=(f"jsonl:{out}",), validation_fraction=0.5))
  assert sum(len(source.documents(side)) for side in ("train", "validation")) == len(texts)


@pytest.mark.parametrize(
  ("extra", "words"),
  [
    ([], "out=None: is missing"),
    (["--out=/no/such/folder/x.jsonl"], "make it"),
    (["--out={}/new.jsonl", "--alpha=-1"], "alpha=-1.0: must be above 0"),
    (["--out={}/new.jsonl", "--fluency=1"], "fluency='1': must be a share"),
    (["--out={}/new.jsonl", "--alpha=0"], "leaves nothing to do"),
    (["--out={}/new.jsonl", "--drop_advertising=0.4"], "give --advertising=SOURCE"),
    (["--out={}/new.jsonl", "--flency=1"], "did you mean --fluency?"),
    (["--out={}/web.jsonl"], "exists already; name a new file"),
  ],
)
def test_mistakes_are_one_sentence(corpora, extra, words, tmp_path, capsys):
  # Catches a corpus that is overwritten, and mistakes that are found after minutes of scoring.
  before = (tmp_path / "web.jsonl").read_bytes()
  argv = ["filter", *corpora, *(flag.format(tmp_path) for flag in extra)]
  assert command.main(argv) == 2
  error = capsys.readouterr().err
  assert words in error and error.count("\n") == 1
  assert (tmp_path / "web.jsonl").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_mistakes_in_sources_name_the_flags_of_this_command(corpora, tmp_path, capsys):
  # Catches remedies that this command does not take.
  out = f"--out={tmp_path}/new.jsonl"
  assert command.main(["filter", corpora[0], f"--curated=text:{tmp_path}/none.txt", out]) == 2
  assert capsys.readouterr().err.startswith("error: curated='text:")
  assert command.main(["filter", *corpora, "--text_field=body", out]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: text_field='body'") and "with --text_field=text" in error


def test_curated_text_is_asked_for(corpora, tmp_path, capsys):
  # Catches a filter by quality that keeps everything.
  assert command.main(["filter", corpora[0], f"--out={tmp_path}/new.jsonl"]) == 2
  assert "--curated=SOURCE" in capsys.readouterr().err
