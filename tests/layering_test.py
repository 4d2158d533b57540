"""Tests that each room of moe_jax (a package or a module) imports only the rooms before it."""

import ast
import pathlib

import pytest

pytestmark = pytest.mark.unit

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "moe_jax"
# The rooms in their order: those that use no others, those that a token passes through, those that
# work on a config, and those that a user calls.
ROOMS = (
  "errors",
  "options",
  "hlo",
  "distributed",
  "sharding",
  "data",
  "routing",
  "dispatch",
  "experts",
  "layers",
  "models",
  "generation",
  "training",
  "assembly",
  "accounts",
  "analysis",
  "report",
  "run",
  "interop",
  "surgery",
  "dryrun",
  "commands",
)
# The modules of the room "commands", to which each __main__.py belongs, too.
COMMANDS = ("train", "launch", "describe", "routers", "inspect", "compare", "convert", "commands")
# The rooms that may import only "errors" and "options".
ALONE = ("errors", "options", "hlo", "distributed", "sharding", "data")


def _room(path: pathlib.Path) -> str:
  """Returns the room that a file of the package belongs to."""
  name = path.relative_to(PACKAGE).with_suffix("").parts[0]
  return "commands" if name in COMMANDS or path.name == "__main__.py" else name


def _imports(path: pathlib.Path):
  """Yields (room, line) for each import of the package, including imports inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: a relative import does not name its room"
      if node.module == "moe_jax":
        yield from ((_room_named(alias.name), node.lineno) for alias in node.names)
      elif node.module and node.module.startswith("moe_jax."):
        yield _room_named(node.module.split(".")[1]), node.lineno
    elif isinstance(node, ast.Import):
      yield from (
        (_room_named(a.name.split(".")[1]), node.lineno)
        for a in node.names
        if a.name.startswith("moe_jax.")
      )


def _room_named(name: str) -> str:
  """Returns the room of a module or package directly below moe_jax."""
  return "commands" if name in COMMANDS else name


FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def test_every_room_has_its_place():
  # Catches a new package that has no place in the order.
  assert {_room(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
  # Catches an import of layers/ in dispatch/, even inside a function. There can be no cycles
  # either.
  allowed = set(ROOMS[: ROOMS.index(room) + 1])
  wrong = [
    f"{p}:{line} imports {name}"
    for p in FILES
    if _room(p) == room
    for name, line in _imports(p)
    if name not in allowed
  ]
  assert not wrong, wrong


@pytest.mark.parametrize("room", ALONE)
def test_leaves_import_nothing_but_errors_and_options(room):
  # Catches a data pipeline or a mesh that depends on a model, and a parser of programs that depends
  # on a mesh. "hlo" may not even import "errors" and "options".
  allowed = {room} if room == "hlo" else {room, "errors", "options"}
  wrong = [
    f"{p}:{line} imports {name}"
    for p in FILES
    if _room(p) == room
    for name, line in _imports(p)
    if name not in allowed
  ]
  assert not wrong, wrong


def test_routing_and_dispatch_know_no_linen():
  # Catches a router that owns parameters. Routers and dispatchers are pure functions.
  for stage in ("routing", "dispatch"):
    for path in (PACKAGE / stage).rglob("*.py"):
      modules = {
        getattr(n, "module", None) or a.name
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
      }
      names = {
        a.name
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.ImportFrom) and n.module == "flax"
        for a in n.names
      }
      assert "linen" not in names and not any(m.startswith("flax.linen") for m in modules), path


def test_only_four_rooms_read_the_model_config():
  # Catches a module that reads config.model, which would tie it to one schema of configs. Interop
  # translates that schema, and surgery makes models of other models, so that they must read it.
  readers = [
    p.relative_to(PACKAGE).as_posix()
    for p in FILES
    if p.relative_to(PACKAGE).parts[0] not in ("assembly", "accounts", "interop", "surgery")
    and any(map(_reads_the_model_config, ast.walk(ast.parse(p.read_text()))))
  ]
  assert not readers, readers


def _reads_the_model_config(node: ast.AST) -> bool:
  """Returns whether a node is the attribute `model` of an expression that ends with "config"."""
  return (
    isinstance(node, ast.Attribute)
    and node.attr == "model"
    and ast.unparse(node.value).endswith("config")
  )


def test_tests_mirror_the_package():
  # Catches a new module without a test file.
  tests = {
    p.relative_to(PACKAGE.parent / "tests").as_posix()
    for p in (PACKAGE.parent / "tests").rglob("*_test.py")
  }
  missing = []
  for path in PACKAGE.rglob("*.py"):
    relative = path.relative_to(PACKAGE)
    # The published families are tested together in interop/families_test.py.
    if relative.parts[:2] == ("interop", "families"):
      continue
    # Declarations of options are tested together in assembly/sections_test.py.
    declares_options = path.name == "options.py" and relative.parts[0] in (
      "models",
      "data",
      "training",
    )
    mirror = relative.with_name(f"{path.stem}_test.py").as_posix()
    if path.name == "__init__.py" or declares_options or mirror in tests:
      continue
    missing.append(relative.as_posix())
  assert not missing, missing


def test_public_names_can_be_imported():
  # Catches a public name that type checkers see but that cannot be imported, or the reverse.
  import moe_jax

  assert set(moe_jax.__all__) == set(moe_jax._PUBLIC) <= set(dir(moe_jax))
  assert all(getattr(moe_jax, name) is not None for name in moe_jax.__all__)
