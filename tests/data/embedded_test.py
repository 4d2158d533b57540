import ast
import subprocess
import sys
import unicodedata

import pytest

from moe_jax import data as data_package
from moe_jax.data import embedded
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.fixture
def sources(data, corpus_cache):
  data.cache_dir, data.validation_fraction = corpus_cache, 0.05
  return {s.name.partition(":")[2]: s for s in data_package.make_sources(data)}


def test_sizes(sources):
  # Catches a domain that has lost most of its text, e.g. by a filter that matches all modules.
  sizes = {
    name: [sum(map(len, s.documents(side))) for side in ("train", "validation")]
    for name, s in sources.items()
  }
  assert 1_200_000 < sum(sizes["prose"]) < 3_000_000
  assert 3_000_000 < sum(sizes["code"]) < 7_000_000
  assert 1_200_000 < sum(sizes["tables"]) < 2_000_000
  assert all(0.01 < validation / train < 0.12 for train, validation in sizes.values()), sizes
  assert all(
    len(set(f.fingerprint for f in sources.values())) == 3 and len(s.fingerprint) == 64
    for s in sources.values()
  )


def test_code_is_code_without_docstrings(sources):
  # Catches docstrings that are not removed, whose text belongs to the prose domain, and bodies that
  # are empty after their removal.
  documents = sources["code"].documents("train")
  for i in range(0, len(documents), 20):
    tree = ast.parse(documents[i])
    assert not [
      n for n in ast.walk(tree) if isinstance(n, embedded._DOCUMENTED) and ast.get_docstring(n)
    ]


def test_left_out_modules(sources):
  # Catches text of packages that some distributions leave out, so that the corpus would differ
  # between installations.
  for name in ("code", "prose"):
    for side in ("train", "validation"):
      documents = sources[name].documents(side)
      parts = {part for i in range(len(documents)) for part in documents.key(i).split("/")}
      assert not parts & {"test", "tests", "idlelib", "site-packages", "encodings", "tkinter"}
      assert not [part for part in parts if part.startswith("_sysconfigdata")]


def test_tables_are_rows_of_the_character_database(sources):
  # Catches rows that are truncated, documents of another size, and names that are computed from the
  # code.
  rows = [
    line
    for text in sources["tables"].documents("validation")
    for line in text.decode().splitlines()
  ]
  for row in rows:
    code, name, category, *rest = row.split(";")
    assert (
      unicodedata.name(chr(int(code, 16))) == name
      and unicodedata.category(chr(int(code, 16))) == category
    )
    assert len(rest) == 6 and not name.startswith("CJK UNIFIED IDEOGRAPH-")
  assert all(text.count(b"\n") == 128 for text in list(sources["tables"].documents("train"))[:-1])


def test_the_same_text_in_another_process():
  # Catches an order that depends on the hash seed or the file system, and addresses in the text.
  script = """if True:
    import hashlib
    from moe_jax.data import embedded
    trees = [(key, embedded._parse(path)) for key, path in list(embedded._modules())[:40]]
    text = repr([list(build(trees)) for build in (embedded._prose, embedded._code)])
    digest = hashlib.sha256(text.encode()).hexdigest(), len(text), " object at 0x" in text
    print(digest)"""
  out = subprocess.run(
    [sys.executable, "-c", script],
    env={"PYTHONPATH": f"{data_package.__path__[0]}/../.."},
    capture_output=True,
    check=True,
    text=True,
  ).stdout
  here = {}
  exec(script, here)
  assert (
    out.strip() == repr(here["digest"]) and here["digest"][1] > 100_000 and not here["digest"][2]
  )


def test_unknown_domain(data):
  # Catches a corpus that is built, which takes seconds, before the name is checked, and an error
  # that does not suggest the nearest name.
  data.sources = ("embedded:pros",)
  with pytest.raises(ConfigError, match="data.sources='embedded:pros': did you mean 'prose'"):
    data_package.make_sources(data)


def test_an_interpreter_without_its_library(monkeypatch):
  # Catches a corpus that is nearly empty because the standard library is zipped or compiled.
  monkeypatch.setattr(embedded, "_modules", lambda: iter(()))
  with pytest.raises(ConfigError, match="standard library"):
    embedded.corpus()


@pytest.mark.parametrize(
  "damage",
  [
    lambda whole: whole[:500],
    lambda whole: b"\xff" * len(whole),
    lambda whole: whole[:200] + bytes([whole[200] ^ 8]) + whole[201:],
  ],
)
def test_a_damaged_corpus_is_collected_anew(monkeypatch, tmp_path, capfd, damage):
  # Catches a BadZipFile, and another text under the same name.
  small = {domain: [("a", b"one " * 99), ("b", b"two " * 99)] for domain in embedded.DOMAINS}
  monkeypatch.setattr(embedded, "corpus", lambda: small)
  path = embedded._build(tmp_path)
  path.write_bytes(damage(path.read_bytes()))
  documents, _ = embedded._load(tmp_path)["prose"]
  assert [documents[i] for i in range(2)] == [text for _, text in small["prose"]]
  assert f"{path} is damaged" in capfd.readouterr().err
