import json
import os

import pytest

from moe_jax.data import files, make_sources
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


def _open(data, name):
  data.sources = (name,)
  return make_sources(data)[0]


def _all(source):
  """Returns the text of each document of both splits by its key."""
  return {d.key(i): d[i] for d in source.splits.values() for i in range(len(d))}


def test_a_folder_is_its_files(data, tmp_path):
  # Catches hidden or empty files that are read, keys that contain the path of the folder, and
  # folders that are not searched recursively.
  folder = tmp_path / "t"
  (folder / "sub").mkdir(parents=True)
  for path, text in (
    ("a.txt", b"one"),
    ("sub/b.txt", b"two\xff\xfe"),
    (".hidden", b"no"),
    ("empty", b""),
  ):
    (folder / path).write_bytes(text)
  assert _all(_open(data, f"text:{folder}")) == {"a.txt:0": b"one", "sub/b.txt:0": b"two\xff\xfe"}
  assert _all(_open(data, f"text:{tmp_path}/*/**/*.txt")) == {
    "t/a.txt:0": b"one",
    "t/sub/b.txt:0": b"two\xff\xfe",
  }


@pytest.mark.parametrize("line", [b"some line of text\n", "\u4e16".encode()])
def test_a_large_file_is_several_documents(data, tmp_path, line):
  # Catches bytes that are lost or repeated at the cuts, a cut inside a line, and a cut inside a
  # character of a text without line ends.
  content = line * (300_000 // len(line))
  (tmp_path / "big.txt").write_bytes(content)
  documents = _all(_open(data, f"text:{tmp_path}/big.txt"))
  in_order = [documents[key] for key in sorted(documents, key=lambda k: int(k.split(":")[1]))]
  assert b"".join(in_order) == content and len(in_order) == 5
  assert all(len(d) <= 2**16 and len(d) % len(line) == 0 for d in in_order)


def test_fingerprint_is_of_the_text_not_of_the_place(data, tmp_path):
  # Catches a fingerprint that depends on absolute paths or times, and one that does not notice an
  # edit or a renamed file.
  prints = []
  for place, texts in (
    ("x", {"a": b"1", "b": b"2"}),
    ("y", {"a": b"1", "b": b"2"}),
    ("z", {"a": b"1", "b": b"3"}),
    ("w", {"a": b"1", "c": b"2"}),
  ):
    (tmp_path / place).mkdir()
    for name, text in texts.items():
      (tmp_path / place / name).write_bytes(text)
    prints.append(_open(data, f"text:{tmp_path}/{place}").fingerprint)
  assert prints[0] == prints[1] and len(set(prints)) == 3


def test_jsonl(data, tmp_path):
  # Catches blank lines that are read as documents, escapes that are not decoded, and a last line
  # that is lost because it has no line end.
  lines = [json.dumps({"text": f"line {i} \u4e16\n", "n": i}) for i in range(9)]
  (tmp_path / "a.jsonl").write_text("\n".join(lines[:5]) + "\n\n")
  (tmp_path / "b.jsonl").write_text("\n".join(lines[5:]))
  source = _open(data, f"jsonl:{tmp_path}/*.jsonl")
  assert sorted(_all(source).values()) == [f"line {i} \u4e16\n".encode() for i in range(9)]
  assert {key.split(":")[0] for key in _all(source)} == {"a.jsonl", "b.jsonl"}


def test_jsonl_of_which_all_is_held_out(data, tmp_path):
  # Catches text for evaluation alone that is refused, or whose wrong field is not noticed, because
  # no document is for training.
  (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
  data.validation_fraction = 1.0
  source = _open(data, f"jsonl:{tmp_path}/a.jsonl")
  assert sorted(source.documents("validation")) == [b"x", b"y"]
  assert len(source.documents("train")) == 0
  data.text_field = "body"
  with pytest.raises(ConfigError, match="a.jsonl at byte 0"):
    _open(data, f"jsonl:{tmp_path}/a.jsonl")


def test_jsonl_errors_name_the_line(data, tmp_path):
  # Catches a KeyError or JSONDecodeError in the middle of training that does not name the line.
  (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
  with pytest.raises(
    ConfigError, match=r"data.text_field='text': .*a.jsonl at byte \d+: .* it has body"
  ):
    _open(data, f"jsonl:{tmp_path}/a.jsonl")
  (tmp_path / "b.jsonl").write_text("{'text': 1}\nplain text\n")
  with pytest.raises(ConfigError, match="b.jsonl at byte .* not JSON"):
    _open(data, f"jsonl:{tmp_path}/b.jsonl")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_nothing_there(data, tmp_path, kind):
  # Catches an empty source that is trained on, or whose error does not name the source.
  (tmp_path / "empty").write_text("")
  (tmp_path / "folder").mkdir()
  for name, remedy in (
    ("missing", "no such file"),
    ("empty", "the file is empty"),
    ("folder", "no files"),
    ("x*.txt", "no file matches"),
  ):
    with pytest.raises(ConfigError, match=f"data.sources='{kind}:.*{remedy}"):
      _open(data, f"{kind}:{tmp_path}/{name}")


@pytest.mark.parametrize(
  "value, said",
  [
    ("null", "it is null and not a string"),
    ("3", "it is a number and"),
    ("1e400", "it is a number and"),
    ("true", "it is true or false and"),
    ("[]", "it is an array and"),
    ("{}", "it is an object and"),
  ],
)
def test_a_field_that_is_no_string(data, tmp_path, value, said):
  # Catches a message that denies that a line has the field although it has.
  (tmp_path / "a.jsonl").write_text(f'{{"text": {value}}}\n' * 3)
  with pytest.raises(
    ConfigError, match=f"data.text_field='text': .*a.jsonl at byte .*: in this line {said}"
  ):
    _open(data, f"jsonl:{tmp_path}/a.jsonl")


@pytest.mark.parametrize(
  "line, said",
  [
    (
      '{"id": 1, "body": "x"}',
      "it has id, body; name its field with --config.data.text_field=body$",
    ),
    ('{"id": 1}', "it has id, none of which is a string$"),
    ("{}", "it has no field at all$"),
    ("[1]", "is an array and"),
    ("NaN", "is a number and"),
    ("[" * 100_000, "nested too deeply"),
    ("1" * 5000, "is not JSON"),
    ("\0", "is not JSON"),
  ],
)
def test_lines_that_are_no_document(data, tmp_path, line, said):
  # Catches a RecursionError and other exceptions, and a remedy that names a field that is not a
  # string.
  (tmp_path / "a.jsonl").write_text(f"{line}\n" * 3)
  with pytest.raises(ConfigError, match=f"^data.(sources|text_field)=.*a.jsonl at byte .*{said}"):
    _open(data, f"jsonl:{tmp_path}/a.jsonl")


def test_a_file_that_was_touched_or_copied_over_is_the_same(data, tmp_path):
  # Catches a run that ends because a backup has touched the files, and one that hashes them at each
  # read after that.
  for i in range(5):
    (tmp_path / f"{i}.txt").write_text(f"text {i}")
  source = _open(data, f"text:{tmp_path}")
  before = _all(source)
  for path in tmp_path.glob("*.txt"):
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))
  assert _all(source) == before
  (tmp_path / "0.txt").write_text("TEXT 0")
  with pytest.raises(ConfigError, match="0.txt has changed since .*another --workdir"):
    _all(source)


def test_a_file_that_grows_while_its_fingerprint_is_taken(data, tmp_path, monkeypatch):
  # Catches a fingerprint and documents that belong to different versions of the text.
  path = tmp_path / "a.txt"
  path.write_text("one\ntwo\n")

  def cut(file):
    with path.open("a") as other:
      other.write("three\n")
    return iter([(0, 4)])

  monkeypatch.setattr(files, "_pieces", cut)
  with pytest.raises(
    ConfigError, match="a.txt changed while it was read; run the same command again"
  ):
    _open(data, f"text:{path}")


@pytest.mark.parametrize("name", ["~nobody_of_this_name/x", "x" * 5000, "a\0b", "[", "\ud800"])
def test_names_that_no_file_can_have(data, name):
  # Catches OSError, RuntimeError and ValueError of the path library.
  for kind in ("text", "jsonl"):
    with pytest.raises(ConfigError, match="^data.sources="):
      _open(data, f"{kind}:{name}")
