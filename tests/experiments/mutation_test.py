"""Checks what the mutation run changes, what it leaves alone, and what its table counts."""

import ast
import pathlib

import pytest

from experiments.mutation import judge
from experiments.mutation import sample as command
from experiments.mutation.operators import Mutant, mutants, source

pytestmark = pytest.mark.unit

CODE = '''
"""A docstring with 1 < 2."""
import jax.numpy as jnp


def f(x: "Float[Array, 1]", n: int = 3) -> "Int[Array, 4]":
  """Returns 5 + 6."""
  if n < 2:
    raise ValueError(f"{n} + 7 is too small")
  total = jnp.sum(x[1:]) * 0.5
  return total, not n
'''


RAISES = "\n    raise ValueError(f'{n} + 7 is too small')"


@pytest.fixture
def root(tmp_path):
  (tmp_path / "a.py").write_text(CODE)
  return tmp_path


def test_every_place_is_changed_and_no_text(root):
  # Catches an operator that is gone, and changes of docstrings, annotations or messages, which no
  # test should notice.
  found = {(one.before, one.after) for one in mutants(root, "a.py")}
  assert found == {
    ("3", "4"),
    ("n < 2", "n <= 2"),
    ("2", "3"),
    ("1:", ":"),
    ("1", "2"),
    ("0.5", "1.0"),
    ("not n", "n"),
    ("jnp.sum(x[1:])", "jnp.max(x[1:])"),
    ("jnp.sum(x[1:]) * 0.5", "jnp.sum(x[1:]) / 0.5"),
    ("return (total, not n)", "return (not n, total)"),
    (f"if n < 2:{RAISES}", f"if not n < 2:{RAISES}"),
  }


def test_a_mutant_is_one_change(root):
  # Catches a number that names another change than the one that was listed, and a file that changes
  # in two places.
  whole = ast.unparse(ast.parse(CODE))
  for one in mutants(root, "a.py"):
    changed = source(root, one)
    differs = [
      (a, b) for a, b in zip(whole.splitlines(), changed.splitlines(), strict=True) if a != b
    ]
    assert len(differs) == 1 and one.after.splitlines()[0] in differs[0][1], one


def test_the_sample_takes_from_every_file():
  # Catches a sample of the first file only, and one that its seed does not fix.
  made = [
    Mutant(f"{name}.py", line, line, "a", "b")
    for name, count in (("a", 90), ("b", 10))
    for line in range(count)
  ]
  chosen = command.drawn(made, 20, 0)
  assert [sum(one.path == f"{name}.py" for one in chosen) for name in "ab"] == [18, 2]
  assert (
    chosen == command.drawn(made, 20, 0) != command.drawn(made, 20, 1) and len(set(chosen)) == 20
  )
  assert sorted(command.drawn(made, 1000, 0), key=lambda one: (one.path, one.line)) == made


def test_its_own_tests_judge_first():
  # Catches judges that do not execute the line, the slowest first, and more of them than there is
  # time for.
  mutant = Mutant("moe_jax/routing/top_k.py", 40, 0, "a", "b")
  lines = {"moe_jax/routing/top_k.py": frozenset({40})}
  judges = [
    judge.Judge(path, seconds, here)
    for path, seconds, here in (
      ("tests/layers/moe_test.py::slow", 5.0, lines),
      ("tests/layers/moe_test.py::fast", 1.0, lines),
      ("tests/routing/base_test.py::other", 9.0, lines),
      ("tests/routing/top_k_test.py::own", 99.0, lines),
      ("tests/layers/gate_test.py::elsewhere", 1.0, {"moe_jax/routing/top_k.py": frozenset({3})}),
    )
  ]
  own, others = judge._order(mutant, judges, 10.0)
  assert [each.name for each in own] == ["tests/routing/top_k_test.py::own"]
  assert [each.name for each in others] == [
    "tests/layers/moe_test.py::fast",
    "tests/layers/moe_test.py::slow",
  ]


def test_what_runs_at_import_is_judged_by_all_tests_of_the_module():
  # Catches a changed default, whose line no test executes, that no test may judge.
  mutant = Mutant("moe_jax/routing/top_k.py", 15, 0, "a", "b")
  judges = [
    judge.Judge(
      "tests/routing/top_k_test.py::own", 1.0, {"moe_jax/routing/top_k.py": frozenset({40})}
    ),
    judge.Judge(
      "tests/layers/ffn_test.py::elsewhere", 1.0, {"moe_jax/layers/ffn.py": frozenset({15})}
    ),
  ]
  own, others = judge._order(mutant, judges, 10.0)
  assert [each.name for each in own] == ["tests/routing/top_k_test.py::own"] and not others


def test_the_table_counts():
  # Catches survivors that count as noticed.
  possible = {"routing/": [Mutant("r.py", n, n, "a", "b") for n in range(4)], "dispatch/": []}
  text = command.table(
    possible, {one: "t" * (one.line > 0) for one in possible["routing/"]}, 3, 60.0
  )
  assert (
    "| routing/ | 4 | 4 | 3 (75.0%) |" in text and "| **all** | 4 | 4 | **3 (75.0%)** |" in text
  )


def test_the_page_has_room_for_the_table():
  # Catches markers that were moved away, which --write would look for in vain.
  page = pathlib.Path(command.PAGE).read_text()
  assert page.index("<!-- table:mutation -->") < page.index("<!-- /table:mutation -->")
