"""Makes small changes of a module's source, each of which a test should notice."""

from __future__ import annotations

import ast
import copy
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

COMPARISONS = {
  ast.Lt: ast.LtE,
  ast.LtE: ast.Lt,
  ast.Gt: ast.GtE,
  ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.Is: ast.IsNot,
  ast.IsNot: ast.Is,
  ast.In: ast.NotIn,
  ast.NotIn: ast.In,
}
ARITHMETIC = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Div,
  ast.Div: ast.Mult,
  ast.FloorDiv: ast.Mult,
  ast.Mod: ast.FloorDiv,
  ast.Pow: ast.Mult,
  ast.BitAnd: ast.BitOr,
  ast.BitOr: ast.BitAnd,
}
# Functions of arrays that replace each other: they take the same arguments and return another
# result. None means that the call is replaced by its argument.
NAMES = {
  "max": "min",
  "min": "max",
  "maximum": "minimum",
  "minimum": "maximum",
  "argmax": "argmin",
  "sum": "max",
  "mean": "sum",
  "zeros": "ones",
  "ones": "zeros",
  "zeros_like": "ones_like",
  "ones_like": "zeros_like",
  "floor": "ceil",
  "ceil": "floor",
  "any": "all",
  "all": "any",
  "exp": "abs",
  "log": "abs",
  "sqrt": "abs",
  "softmax": "log_softmax",
  "logsumexp": "max",
  "square": "abs",
  "cumsum": "cumprod",
  "isfinite": "isnan",
  "stop_gradient": None,
}


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A change of one place of one file.

  Attributes:
    path: The path of the file, relative to the repository.
    line: The line of the change.
    number: The number of the change among those of the file.
    before: The expression or statement before the change, as text.
    after: The expression or statement after the change, as text.
  """

  path: str
  line: int
  number: int
  before: str
  after: str

  def __str__(self) -> str:
    def shorten(text):
      return text.splitlines()[0][:80]

    return f"{self.path}:{self.line}: `{shorten(self.before)}` became `{shorten(self.after)}`"


def mutants(root: pathlib.Path, path: str) -> list[Mutant]:
  """Returns all changes of a file, in the order of its syntax tree."""
  tree = ast.parse((root / path).read_text())
  return [
    Mutant(path, node.lineno, number, ast.unparse(node), ast.unparse(new))
    for number, (node, new) in enumerate(_changes(tree))
  ]


def source(root: pathlib.Path, mutant: Mutant) -> str:
  """Returns the text of the changed file, without its comments."""
  tree = ast.parse((root / mutant.path).read_text())
  node, new = next(
    change for number, change in enumerate(_changes(tree)) if number == mutant.number
  )

  class Put(ast.NodeTransformer):
    def visit(self, here):
      return new if here is node else self.generic_visit(here)

  return ast.unparse(ast.fix_missing_locations(Put().visit(tree)))


def _changes(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
  """Yields each node that can be changed, with the node that takes its place.

  Docstrings, annotations and the words of messages are left alone.
  """
  for node in _walk(tree):
    for new in _of_node(node):
      yield node, ast.copy_location(new, node)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
  for field, child in ast.iter_fields(node):
    if field in ("annotation", "returns", "type_comment") or isinstance(node, ast.Raise):
      continue
    # The fields and methods of a class matter. Its bases, imports and decorators do not.
    if field in ("bases", "decorator_list", "names", "type_params"):
      continue
    for each in child if isinstance(child, list) else [child]:
      if isinstance(each, ast.AST) and not isinstance(each, (ast.Import, ast.ImportFrom)):
        yield each
        yield from _walk(each)


def _of_node(node: ast.AST) -> Iterator[ast.AST]:
  def changed(change):
    return _copied(node, change)

  match node:
    case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
      yield changed(lambda new: setattr(new, "ops", [COMPARISONS[type(op)]()]))
    case ast.BinOp(op=op) if type(op) in ARITHMETIC and not _is_text(node):
      yield changed(lambda new: setattr(new, "op", ARITHMETIC[type(op)]()))
    case ast.AugAssign(op=op) if type(op) in ARITHMETIC:
      yield changed(lambda new: setattr(new, "op", ARITHMETIC[type(op)]()))
      yield ast.Pass()
    case ast.BoolOp(op=op):
      yield changed(
        lambda new: setattr(new, "op", ast.Or() if isinstance(op, ast.And) else ast.And())
      )
    case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))) if value:
      # -1 becomes 0 and not 1, because of two axes the last one is also number 1.
      yield ast.Constant(0)
    case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
      yield copy.deepcopy(operand)
    case ast.Constant(value=bool(value)):
      yield ast.Constant(not value)
    case ast.Constant(value=int(value)):
      yield ast.Constant(value + 1)
    case ast.Constant(value=float(value)):
      yield ast.Constant(value * 2 if value else 1.0)
    case ast.Call(func=ast.Attribute(attr=name)) if name in NAMES and NAMES[name] is None:
      yield copy.deepcopy(node.args[0])
    case ast.Call(func=ast.Attribute(attr=name)) if name in NAMES:
      yield changed(lambda new: setattr(new.func, "attr", NAMES[name]))
    case ast.Call(func=ast.Name(id=name)) if name in ("max", "min", "any", "all"):
      yield changed(lambda new: setattr(new.func, "id", NAMES[name]))
    case ast.IfExp():
      yield copy.deepcopy(node.body)
      yield copy.deepcopy(node.orelse)
    case ast.If() | ast.While():
      yield changed(lambda new: setattr(new, "test", ast.UnaryOp(ast.Not(), new.test)))
    case ast.Slice(lower=None, upper=None):
      pass
    case ast.Slice(upper=None):
      yield ast.Slice()
    case ast.Expr(value=ast.Call()):
      yield ast.Pass()
    case ast.Return(value=ast.Tuple(elts=elements)) if len(elements) == 2:
      yield changed(lambda new: setattr(new.value, "elts", new.value.elts[::-1]))


def _copied(node: ast.AST, change: Callable[[ast.AST], None]) -> ast.AST:
  new = copy.deepcopy(node)
  change(new)
  return new


def _is_text(node: ast.BinOp) -> bool:
  """Returns whether an operation joins or formats strings."""
  return any(
    isinstance(side, ast.JoinedStr)
    or isinstance(side, ast.Constant)
    and isinstance(side.value, str)
    for side in (node.left, node.right)
  )
