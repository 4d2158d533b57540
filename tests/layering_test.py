"""The import arrow of the house: routing -> dispatch -> experts -> layers -> models -> training."""

import ast
import pathlib

import pytest

pytestmark = pytest.mark.unit

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "moe_jax"
STAGES = ("routing", "dispatch", "experts", "layers", "models", "training")


def _stage(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(path: pathlib.Path):
  """(top module inside moe_jax, line) for each import of the package, also those inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the arrow"
      if node.module == "moe_jax":
        yield from ((alias.name, node.lineno) for alias in node.names)
      elif node.module and node.module.startswith("moe_jax."):
        yield node.module.split(".")[1], node.lineno
    elif isinstance(node, ast.Import):
      yield from ((a.name.split(".")[1], node.lineno) for a in node.names if a.name.startswith("moe_jax."))


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_only_stages_to_their_left(stage):
  # Catches: an import of layers/ from dispatch/, in whatever function it hides.
  allowed = set(STAGES[:STAGES.index(stage) + 1])
  files = [p for p in PACKAGE.rglob("*.py") if _stage(p) == stage]
  assert files
  wrong = [f"{p}:{line} imports {name}" for p in files for name, line in _imports(p)
           if name in STAGES and name not in allowed]
  assert not wrong, wrong


def test_leaves_import_no_stage():
  # Catches: the data pipeline or the mesh depending on a model. (dispatch/ may read sharding/, never the reverse.)
  wrong = [f"{p}:{line} imports {name}" for p in PACKAGE.rglob("*.py") if _stage(p) in {"data", "sharding", "errors"}
           for name, line in _imports(p) if name in STAGES]
  assert not wrong, wrong


def test_hlo_imports_nothing_of_ours():
  # Catches: a parser of programs that depends on models, meshes or a command.
  wrong = [f"{p}:{line} imports {name}" for p in PACKAGE.rglob("*.py") if _stage(p) == "hlo"
           for name, line in _imports(p) if name != "hlo"]
  assert not wrong, wrong


def test_routing_and_dispatch_know_no_linen():
  # Catches: a router that owns parameters. Routers and dispatchers are pure functions.
  for stage in ("routing", "dispatch"):
    for path in (PACKAGE / stage).rglob("*.py"):
      modules = {getattr(n, "module", None) or a.name for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
      names = {a.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)
               and n.module == "flax" for a in n.names}
      assert "linen" not in names and not any(m.startswith("flax.linen") for m in modules), path


def test_only_build_reads_the_model_config():
  # Catches: a module that reaches into config.model, which would tie it to one config schema.
  readers = [p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")
             if _stage(p) != "build" and any(map(_reads_the_model_config, ast.walk(ast.parse(p.read_text()))))]
  assert not readers, readers


def _reads_the_model_config(node: ast.AST) -> bool:
  return isinstance(node, ast.Attribute) and node.attr == "model" and ast.unparse(node.value).endswith("config")


def test_tests_mirror_the_package():
  # Catches: a module that lands without a test of its own.
  tests = {p.relative_to(PACKAGE.parent / "tests").as_posix() for p in (PACKAGE.parent / "tests").rglob("*_test.py")}
  missing = []
  for path in PACKAGE.rglob("*.py"):
    relative = path.relative_to(PACKAGE)
    if path.name == "__init__.py" or relative.with_name(f"{path.stem}_test.py").as_posix() in tests:
      continue
    missing.append(relative.as_posix())
  assert not missing, missing
