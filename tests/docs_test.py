"""Tests that links of the documentation lead to files, and that its commands can be pasted.

Nothing is trained: a command line is read as the command itself reads it, and its config is checked
as before a run. Blocks marked ```sh run on a laptop. Blocks marked ```text show output, or commands
that need a pod, a GPU or a download; the commands of moe_jax in them are read, too.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest
from remedies_test import mentions

from moe_jax.__main__ import COMMANDS
from moe_jax.assembly.sections import FUNCTIONS
from moe_jax.commands import take_flags
from moe_jax.routing import ROUTERS

pytestmark = pytest.mark.unit

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
  path
  for pattern in ("docs/**/*.md", "experiments/**/README.md")
  for path in sorted(ROOT.glob(pattern))
]
# A link or a picture of Markdown that names no other site: its path, and the heading after "#".
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
# Python files that a tutorial asks the reader to save: name, content.
FILE = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
READ_CONFIGS = ("train", "launch", "describe", "dryrun")
# Programs that are not ours. `pip install` has a test of its own in remedies_test.py.
FOREIGN = ("pip", "source", "python3 -m venv")


def relative(path):
  return path.relative_to(ROOT).as_posix()


def headings(page):
  """Returns the anchors of a page's headings."""
  titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_relative_links_lead_somewhere():
  # Catches a page or a figure that was moved, and a heading that was renamed.
  checked, wrong = 0, []
  for page in PAGES:
    for path, heading in LINK.findall(FENCE.sub("", page.read_text())):
      target = (page.parent / path).resolve() if path else page
      checked += 1
      if not target.exists() or (heading and heading not in headings(target)):
        wrong.append((relative(page), f"{path}#{heading}"))
  assert checked > 100 and not wrong, wrong


def blocks(language):
  """Returns (page, lines) of each fenced block of a language, with continued lines joined."""
  return [
    (page, body.replace("\\\n", " ").splitlines())
    for page in PAGES
    for name, body in FENCE.findall(page.read_text())
    if name == language
  ]


def module_of(words):
  """Returns (module, arguments) of a command of this repository, or None for another one."""
  for start in (["python", "-m", "moe_jax"], ["moe-jax"]):
    if words[: len(start)] == start and len(words) > len(start):
      command, *arguments = words[len(start) :]
      assert command in COMMANDS, words
      return COMMANDS[command].module.removesuffix(".__main__"), arguments
  if words[:2] == ["python", "-m"]:
    return words[2], words[3:]
  return None


def with_router(arguments, folder):
  """Returns arguments in which the tutorial's router, which is written there, is in `folder`."""
  if router := [a.partition("=")[2] for a in arguments if a.startswith("--router=")]:
    name = router[0].partition(":")[0]
    files = dict(FILE.findall((ROOT / "docs/tutorials/own_router.md").read_text()))
    assert name in files, router
    (folder / name).write_text(files[name])
  return [a.replace("--router=", f"--router={folder}/") for a in arguments]


def read_config(command, arguments, folder):
  """Reads the flags of a command that works on a config, and checks the config."""
  from moe_jax import assembly
  from moe_jax.commands import Flag, parse

  flags = {"launch": ("processes", "devices"), "dryrun": ()}.get(command, ())
  known = [Flag(name) for name in flags]
  if command == "dryrun":
    from moe_jax.dryrun.__main__ import FLAGS as known
  if section := [a.partition("=")[2] for a in arguments if a.startswith("--help=")]:
    from moe_jax.commands.help import section_text

    return section_text(section[0])
  _, rest = take_flags(with_router(arguments, folder), known, passes=command != "dryrun")
  # `convert` writes this file into a workdir.
  rest = [re.sub(r"^--config=runs/.*/config.py$", "--config=mixtral:8x7b", arg) for arg in rest]
  config = parse([command, *rest], workdir=command in ("train", "launch")).config
  if "--config.train.batch_size=0" not in arguments:  # the mistake that a tutorial shows
    assembly.validate(config)


def read_study(arguments, folder):
  """Reads the command line of a study, with its rows and the keys that it changes."""
  from experiments.common import command_line

  if not arguments:
    return
  study = command_line.load_study(arguments[0])
  verbs = command_line.verbs_of(study)
  if len(arguments) == 1:
    return
  verb = verbs[arguments[1]]
  options = command_line._parser(study, arguments[1], verb).read(with_router(arguments[2:], folder))
  if hasattr(options, "only"):
    command_line._job(study, options)


def check(line, page, folder):
  """Raises an exception if a line of a block cannot be pasted."""
  words = shlex.split(line, comments=True)
  if not words:
    return
  if "&&" in words:
    at = words.index("&&")
    check(shlex.join(words[:at]), page, folder)
    check(shlex.join(words[at + 1 :]), page, folder)
    return
  if found := module_of(words):
    module, arguments = found
    if module == "experiments":
      read_study(arguments, folder)
      return
    assert importlib.util.find_spec(module), module
    command = module.removeprefix("moe_jax.")
    if command in READ_CONFIGS:
      read_config(command, arguments, folder)
    elif hasattr(importlib.import_module(module), "FLAGS"):
      take_flags(arguments, importlib.import_module(module).FLAGS, config=False)
  elif words[0] == "make":
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words[1] in targets, words
  elif words[0] == "python":
    assert words[1] in dict(FILE.findall(page.read_text())), words
  else:
    assert line.startswith(FOREIGN), line


@pytest.fixture
def folder(tmp_path):
  """Returns a folder for the files of a page, and forgets afterwards which routers they have."""
  tables = (ROUTERS, FUNCTIONS["model.moe.router"])
  before = [dict(table) for table in tables]
  yield tmp_path
  for table, content in zip(tables, before, strict=True):
    table.clear()
    table.update(content)


def test_commands_for_a_laptop_can_be_pasted(folder):
  # Catches a flag, a key, a row, a target or a config that does not exist, a value that a run would
  # refuse, such as fewer steps than the warm-up, and a command that is not known to run on a
  # laptop.
  from moe_jax.errors import ConfigError

  checked, wrong = 0, []
  for page, lines in blocks("sh"):
    for line in lines:
      try:
        check(line, page, folder)
      except (AssertionError, ConfigError, KeyError, IndexError) as error:
        wrong.append((relative(page), line, str(error)))
      checked += 1
  assert checked > 40 and not wrong, wrong


def test_pages_agree_about_the_runs_that_they_name():
  # A reader pastes one page after the other into the same clone. Catches a workdir that two pages
  # fill with different models, which the second is refused, and a run that no page makes.
  models, read = {}, {}
  for page, lines in blocks("sh"):
    for words in (shlex.split(line, comments=True) for line in lines):
      if words[:4] in (["python", "-m", "moe_jax", "train"], ["python", "-m", "moe_jax", "launch"]):
        (workdir,) = [word for word in words if word.startswith("--workdir=")] or [""]
        model = {w for w in words if w.startswith(("--config=", "--config.model", "--router"))}
        if workdir:
          models.setdefault(workdir, {})[frozenset(model)] = relative(page)
      elif words[:3] == ["python", "-m", "moe_jax"] and words[3] in ("evaluate", "generate"):
        read |= {word: relative(page) for word in words if word.startswith("--workdir=")}
  twice = {workdir: list(of.values()) for workdir, of in models.items() if len(of) > 1}
  assert len(models) > 10 and not twice, twice
  assert read and read.keys() <= models.keys() | {"--workdir=runs/quickstart"}, read


def test_commands_for_other_machines_are_read_by_the_commands(folder):
  # Catches the same mistakes in commands that need a pod, a GPU or a download, and a block of such
  # commands that does not say what it needs.
  checked = 0
  for page, lines in blocks("text"):
    ours = [line for line in lines if re.match(r"(python -m|moe-jax) ", line)]
    for line in ours:
      check(line, page, folder)
    assert not ours or lines[0].startswith("# needs: ") or "batch_size=0" in ours[0], ours
    checked += len(ours)
  assert checked > 8


def test_short_forms_of_commands_exist():
  # Catches `python -m moe_jax COMMAND` of a command that is not there, in any text.
  found = mentions(r"(?:python -m moe_jax|`moe-jax) ([a-z]+)")
  wrong = [(str(path), name) for path, name in found if name not in COMMANDS]
  assert len(found) > 20 and not wrong, wrong


def test_the_readmes_snippet_runs():
  # Catches a public name or an argument that is gone, and losses that are not summed.
  import jax.numpy as jnp

  snippet = (ROOT / "README.md").read_text().partition("<!-- snippet -->")[2]
  variables = {}
  exec(FENCE.search(snippet)[2], variables)
  (total,) = variables["sown"]["losses"]["experts"]
  assert variables["y"].shape == (4, 128, 64) and float(total) > 0
  assert float(jnp.abs(variables["y"] - variables["x"]).max()) > 0


def test_the_nnx_snippet_runs():
  # Catches a layer that NNX cannot hold, weights that are no parameters there, and a loss without
  # the auxiliary one, from which the router would get no gradient of its own.
  import jax
  import jax.numpy as jnp

  snippet = (ROOT / "docs/api/index.md").read_text().partition("<!-- snippet -->")[2]
  variables = {}
  exec(FENCE.search(snippet)[2], variables)
  block, x, grads = (variables[name] for name in ("block", "x", "grads"))
  layer = block.moe.module
  weights = {name: getattr(block.moe, name)[...] for name in grads["moe"]}
  y, aux = layer.apply({"params": weights}, block.norm(x))
  expected = jnp.mean((x + y) ** 2) + layer.losses.total(aux.losses)
  assert float(variables["loss"]) == pytest.approx(float(expected), rel=1e-5)
  assert float(layer.losses.total(aux.losses)) > 0
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


def saved_files(page, folder):
  """Writes the files that a tutorial asks for into a folder."""
  for name, content in FILE.findall((ROOT / page).read_text()):
    (folder / name).write_text(content)


def test_the_tutorials_router_routes(tmp_path):
  # Catches a router that no longer fits `Router` or `RoutingPlan`, gates that do not add up to 1,
  # and a token that visits an expert twice.
  import jax
  import numpy as np

  from moe_jax.routing import RoutingContext

  saved_files("docs/tutorials/own_router.md", tmp_path)
  module = types.ModuleType("my_router")
  exec((tmp_path / "my_router.py").read_text(), module.__dict__)
  logits = jax.random.normal(jax.random.key(0), (6, 4))
  for context in (RoutingContext(), RoutingContext(key=jax.random.key(1), train=True)):
    plan = module.ROUTER.route(logits, context, k=2)
    pairs = set(zip(plan.token.tolist(), plan.expert.tolist(), strict=True))
    assert len(pairs) == 12 and max(expert for _, expert in pairs) < 4
    np.testing.assert_allclose(np.bincount(plan.token, plan.gate), np.ones(6), rtol=1e-5)
  assert module.ROUTER.leak() == "no" and dict(module.ROUTER.options) == {"k": 2}


@pytest.mark.smoke
def test_the_tutorials_tokenizer_is_lossless(tmp_path):
  # Catches an option of the trainer that SentencePiece no longer has, and a tokenizer that changes
  # text or cannot be read.
  from moe_jax.data.tokenizers import make_tokenizer

  saved_files("docs/tutorials/c4_from_zero.md", tmp_path)
  for command in (["make_corpus.py"], ["train_tokenizer.py", "corpus/text.jsonl", "t", "1000"]):
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, capture_output=True)
  tokenizer = make_tokenizer(f"sentencepiece:{tmp_path}/t.model")
  text = "  two  spaces,\n\ttab \u00e9\u4e16 def f(x):\n".encode()
  assert tokenizer.size == 1000 and tokenizer.decode(tokenizer.encode(text)) == text


def test_the_site_finds_links_out_of_docs():
  # Catches a link between docs/ and experiments/ that is right in the repository and wrong on the
  # site, whose root is docs/, and a change of a command in a block.
  spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
  site_pages = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(site_pages)

  def shown(source, markdown):
    uri = source.removeprefix("docs/")
    file = types.SimpleNamespace(abs_src_path=str(ROOT / source), src_uri=uri)
    return site_pages.on_page_markdown(markdown, types.SimpleNamespace(file=file), None, None)

  bench = "experiments/bench/README.md"
  assert shown("docs/results.md", f"[a](../{bench}#b)") == f"[a]({bench}#b)"
  assert shown("docs/tutorials/first_run.md", f"![a](../../{bench})") == f"![a](../{bench})"
  assert shown("experiments/README.md", "[a](../docs/pods.md)") == "[a](../pods.md)"
  assert shown(bench, "[a](results.json)") == "[a](results.json)"
  for text in ("[a](https://x.org/y)", "[a](#b)", "```\n[a](../docs/pods.md)\n```\n"):
    assert shown("experiments/README.md", text) == text
