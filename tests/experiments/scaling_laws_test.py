"""Checks laws at points worked by hand, and fits against the constants that made the points."""

import json

import numpy as np
import pytest
import tiny

from experiments import scaling_laws
from experiments.common import command_line, plots, tables
from experiments.scaling_laws import fit, grid, points, recovery
from experiments.scaling_laws.laws import LAWS, Points
from moe_jax import assembly
from moe_jax.commands import parse
from moe_jax.errors import ConfigError

pytestmark = pytest.mark.unit
HERE = scaling_laws.HERE


def call(*arguments):
  return command_line.main(["experiments", "scaling_laws", *arguments])


@pytest.fixture(autouse=True)
def fewer_points(monkeypatch):
  monkeypatch.setitem(recovery.DESIGNS, "chinchilla", recovery.DESIGNS["chinchilla"].of(slice(80)))
  monkeypatch.setitem(recovery.DESIGNS, "kaplan", recovery.DESIGNS["kaplan"].of(slice(0, None, 2)))
  monkeypatch.setattr(fit, "POLISHED", 2)


def one(n, d=1.0, experts=1.0, granularity=1.0) -> Points:
  return Points(*np.array([[n], [d], [experts], [granularity], [1.0]]))


def loss(name, constants, at) -> float:
  return float(np.exp(LAWS[name].log_loss(at, *constants))[0])


def test_the_laws_at_points_worked_by_hand():
  # Catches exponents or terms that are swapped, natural logarithms in Clark's law, and a
  # granularity that multiplies. Kaplan, α_N / α_D = 2: [(100 / 10)^2 + 21 / 1]^0.5 = 121^0.5 = 11.
  assert loss("kaplan", (100, 21, 1.0, 0.5), one(10, 1)) == pytest.approx(11)
  # Chinchilla: 1 + 6 / 4^0.5 + 8 / 2^3 = 1 + 3 + 1 = 5.
  assert loss("chinchilla", (1, 6, 8, 0.5, 3), one(4, 2)) == pytest.approx(5)
  # Krajewski: 1 + (8 / 4^0.5 + 2) / 9^0.5 + 6 / 2^1 = 1 + 2 + 3 = 6.
  assert loss("krajewski", (1, 8, 0.5, 2, 0.5, 6, 1), one(9, 2, 64, 4)) == pytest.approx(6)
  # Clark: Ê = E_start = 10 at E = 1: log10 L = -0.1 * 2 - 0.2 * 1 + 0.05 * 2 * 1 + 1 = 0.7.
  assert loss("clark", (-0.1, -0.2, 0.05, 1, 10, 1000), one(100, 1, 1)) == pytest.approx(10**0.7)
  # As E grows, Ê goes to E_max = 1000: log10 L = -0.2 - 0.6 + 0.3 + 1 = 0.5.
  assert loss("clark", (-0.1, -0.2, 0.05, 1, 10, 1000), one(100, 1, 1e15)) == pytest.approx(10**0.5)


@pytest.mark.parametrize("name", LAWS)
def test_coordinates_and_back(name):
  # Catches a logarithm that is taken of the wrong constant, Ê's bounds in the wrong order.
  for constants in LAWS[name].published.values():
    assert LAWS[name].back(LAWS[name].coordinates(constants)) == pytest.approx(constants)


@pytest.mark.parametrize("name", LAWS)
def test_points_without_noise_give_the_constants(name):
  # Catches a wrong derivative, descent that stops early, starts that all lead elsewhere.
  published = next(iter(LAWS[name].published.values()))
  found = fit.fit(recovery.sample(name, 0.0, 0), name, bootstrap=0, descents=4)
  assert [value for value, *_ in found.constants().values()] == pytest.approx(published, rel=1e-3)
  assert found.objective < 1e-15 and found.r2 == pytest.approx(1)


@pytest.mark.parametrize("name", tiny.often({"kaplan"}, LAWS))
def test_intervals_hold_the_constants_that_made_the_points(name):
  # A seed in 20 may miss, with most of its constants, which are correlated: two of three seeds hold
  # each. Catches: resamples that are all alike or that are not fitted anew, intervals of one side
  # or about something else.
  found = recovery.recover(name, seeds=3, bootstrap=12)
  assert min(found["inside"].values()) >= 2
  assert all(low < high for _, low, high in found["found"].values())


def test_the_same_seed_gives_the_same_intervals():
  # Catches a bootstrap that its seed does not fix, or that does not read it.
  sample = recovery.sample("kaplan", 0.003, 0)
  first, again, other = (
    fit.fit(sample, "kaplan", 8, seed, descents=2).constants() for seed in (0, 0, 1)
  )
  assert first == again and first != other


def test_one_wild_point_does_not_move_the_fit():
  # Huber's slope is bounded. Catches: squared errors, a δ far from 1e-3.
  sample = recovery.sample("chinchilla", 0.0, 0)
  sample.loss[7] *= 2
  assert fit.fit(sample, "chinchilla", 0, descents=4).constants()["α"][0] == pytest.approx(
    0.34, rel=0.01
  )


def test_a_budget_is_divided_as_in_closed_form():
  # Hoffmann et al., Eq. 4: N = G (C / 6)^a, D = (C / 6)^b / G, G = (α A / β B)^(1 / (α + β)), a = β
  # / (α + β). Catches: a minimum at an end of the search, FLOPs other than 6 N D.
  _, a, b, alpha, beta = LAWS["chinchilla"].published["paper"]
  found = fit.fit(recovery.sample("chinchilla", 0.0, 0), "chinchilla", 4, descents=4)
  for flops in (1e18, 5.76e23):
    best = fit.divide(found, flops, 1.0, 1.0)
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    n, d = g * (flops / 6) ** (beta / (alpha + beta)), (flops / 6) ** (alpha / (alpha + beta)) / g
    assert (best["n"][0], best["d"][0]) == pytest.approx((n, d), rel=1e-3)
  with pytest.raises(ConfigError, match="laws that do: chinchilla, krajewski"):
    fit.divide(fit.fit(recovery.sample("kaplan", 0.0, 0), "kaplan", 0, descents=2), 1e20, 1.0, 1.0)


def test_fine_grained_flops():
  # n_blocks = 2, d = 128, E = 1: N = 128^2 * 12 * 2 = 393,216, all of it met by a token: 6 N, and 6
  # d E G n_blocks = 6 * 128 * 4 * 2 of the router at G = 4. Catches: E counted in the activated
  # weights, blocks forgotten.
  assert LAWS["krajewski"].flops_a_token(393_216, 1, 4) == pytest.approx(6 * 393_216 + 6144)


@pytest.mark.parametrize(
  "change, said",
  [
    ({"experts": np.ones(70)}, "1 value of experts, and its constants take 4"),
    ({"n": np.ones(70)}, "1 value of n"),
  ],
)
def test_degenerate_points_are_refused(change, said):
  # Catches constants that no point can tell apart, fitted all the same.
  with pytest.raises(ConfigError, match=said):
    fit.fit(recovery.sample("clark", 0.003, 0)._replace(**change), "clark", 0)


def test_too_few_points_are_refused():
  # Catches as many points as constants, through which the law goes whatever they are.
  with pytest.raises(ConfigError, match="5 points are too few for its 5 constants; it takes 6"):
    fit.fit(recovery.sample("chinchilla", 0.003, 0).of(slice(5)), "chinchilla", 0)


@pytest.mark.parametrize(
  "name, text, said",
  [
    ("a.csv", "n,d,loss\n1e6,1e9,3\n1e6,x,3\n", r"a.csv:3'.*its d is 'x', which is not a number"),
    ("a.csv", "n,d,loss\n1e6,1e9,3\n1e6,1e9\n", r"a.csv:3'.*does not have the 3 values"),
    ("a.csv", "n,d,loss\n1e6,1e9,-3\n", r"a.csv:2'.*its loss is -3; it must be above 0"),
    ("a.csv", "n,d,loss\n1e6,1e9,nan\n", "its loss is nan"),
    ("a.csv", "n,d\n1e6,1e9\n", "has the columns n, d; a law needs loss and n"),
    ("a.csv", "n,d,loss\n", "has no points"),
    ("a.jsonl", '{"n": 1, "d": 2, "loss": 3}\n{"n": 1,\n', r"a.jsonl:2'.*is not a line of JSON"),
    ("a.jsonl", '{"n": 1, "d": 2, "loss": 3}\n{"n": 1, "loss": 3}\n', r"a.jsonl:2'.*its d is None"),
    ("a.txt", "", "is not a .csv or .jsonl file"),
  ],
)
def test_a_malformed_table_is_one_sentence(tmp_path, name, text, said):
  # Catches a traceback, a line that is passed over, and a sentence without the line's number.
  (tmp_path / name).write_text(text)
  with pytest.raises(ConfigError, match=said):
    points.read(tmp_path / name)


def test_which_points_a_law_is_for():
  # Catches a dense law fitted to routed models, Clark's fitted to short runs, N in another law's
  # count, and a missing column that is taken for 1.
  table = {
    "n_total": np.arange(1.0, 7),
    "n_activated": np.arange(11.0, 17),
    "d": np.array([1.0, 2, 2, 2, 2, 2]),
    "experts": np.array([1.0, 1, 1, 8, 8, 8]),
    "granularity": np.array([1.0, 1, 1, 1, 2, 4]),
    "loss": np.ones(6),
  }
  dense, note = points.select(table, "chinchilla")
  assert dense.n.tolist() == [1, 2, 3] and note == "3 of 6 points, those of experts 1"
  routed, note = points.select(table, "clark")
  assert (
    routed.n.tolist() == [12, 13, 14] and note == "3 of 6 points, those of granularity 1 and d 2"
  )
  with pytest.raises(ConfigError, match="no column n, which it reads"):
    points.select(table, "krajewski")
  with pytest.raises(ConfigError, match="no column experts, which it reads"):
    points.select({key: table[key] for key in ("n_activated", "loss")}, "clark")


def test_a_line_of_a_sweep_as_a_point(tmp_path):
  # Width 32, two layers, 8 experts of width 64 a layer, two a token (E = 4, G = 2): an expert has 2
  # * 32 * 64 = 4096 weights, attention 4 * 32^2, the router 32 * 8, a norm 32. Catches: embeddings
  # in n_body, all experts in n_activated, E for the number of experts, a loss of one source, a
  # diverged run taken for a point.
  row = grid._row("desk", 32, 2, 100, 4, 2)[1]
  line = {"row": "a", "arguments": row.arguments(), "tokens": 204_800, "loss": {"x": 2.0, "y": 3.0}}
  (tmp_path / "a.jsonl").write_text(
    json.dumps(line)
    + "\n"
    + json.dumps({"row": "b", "arguments": row.arguments(), "diverged": "at step 3"})
    + "\n"
  )
  rest = 2 * (4 * 32**2 + 32 * 8 + 2 * 32) + 32
  found = {key: value.tolist() for key, value in points.read(tmp_path / "a.jsonl").items()}
  assert found.pop("n_total")[0] > found["n_body"][0]
  assert found == {
    "n_body": [rest + 2 * 8 * 4096],
    "n_activated": [rest + 2 * 2 * 4096],
    "d": [204_800.0],
    "experts": [4.0],
    "granularity": [2.0],
    "loss": [2.5],
  }


@pytest.mark.parametrize("scale", ["desk", "paper"])
def test_the_grids_are_valid_and_tell_the_constants_apart(scale):
  # Catches a row that would stop before it trains, and a grid from which some law cannot be fitted.
  rows = grid.rows(scale)
  for row in (list(rows.values())[0], list(rows.values())[-1]):
    assembly.validate(parse(["", *row.arguments()], workdir=False).config, 1)
  cells = np.array([[float(part[1:]) for part in name.split("_")] for name in rows])
  table = {
    "n": cells[:, 0],
    "d": cells[:, 2],
    "experts": cells[:, 3],
    "granularity": cells[:, 4],
    "loss": np.ones(len(cells)),
  }
  for name in LAWS:
    fit._check(points.select(table, name)[0], name)


def test_the_command_line(tmp_path, capsys):
  # Catches laws fitted that the columns do not allow, predictions and budgets that are lost, traces
  # for sentences.
  sample = recovery.sample("kaplan", 0.003, 0)
  file = tmp_path / "points.csv"
  file.write_text(
    "n,d,loss\n" + "".join(f"{n},{d},{loss}\n" for n, d, _, _, loss in zip(*sample, strict=True))
  )
  fitted = ["fit", str(file), "--bootstrap=2", "--predict=n=1e9 d=2e10", "--flops=1e21"]
  assert call(*fitted) == 0
  said = capsys.readouterr().out
  assert "clark: left out; there is no column experts" in said and "published 6.4e+13" in said
  assert (
    "loss at n 1e+09, d 2e+10" in said
    and "least loss for 1e+21 FLOPs (beyond the points in n)" in said
  )
  for wrong, words in (
    ("--law=chinchila", "did you mean 'chinchilla'"),
    ("--law=clark", "no column experts"),
    ("--predict=n=x", "must be n=NUMBER"),
    ("--predict=m=1", "known: n, d, experts"),
    ("--bootstrap=-1", "must be 0 or more"),
  ):
    assert call("fit", str(file), wrong) == 2
    assert words in capsys.readouterr().err
  assert call("print", "--scale=desk", "--only=d32_l2_s100_e1_g1") == 0
  assert capsys.readouterr().out.count("python -m moe_jax.train") == 1


def test_the_files_of_a_fit(tmp_path, monkeypatch):
  # Catches a figure or constants that are not written, and the missing library told only after the
  # fit.
  sample = recovery.sample("krajewski", 0.003, 0)
  file = tmp_path / "points.jsonl"
  file.write_text(
    "".join(
      json.dumps(dict(zip(sample._fields, row, strict=True))) + "\n"
      for row in zip(*(field.tolist() for field in sample), strict=True)
    )
  )
  arguments = ["fit", str(file), "--law=krajewski", "--bootstrap=2", f"--out={tmp_path / 'out'}"]
  real = plots.need
  with monkeypatch.context() as patch:
    patch.setattr(plots, "need", lambda module: real(f"no_{module}"))
    assert call(*arguments) == 2 and not (tmp_path / "out").exists()
  pytest.importorskip("matplotlib")
  assert call(*arguments) == 0
  assert json.loads((tmp_path / "out" / "fit.json").read_text())["laws"]["krajewski"][
    "constants"
  ].keys() == set(LAWS["krajewski"].constants)
  assert (tmp_path / "out" / "fit.png").read_bytes()[1:4] == b"PNG"


def test_the_readme_shows_the_results():
  # Catches a table typed by hand, and results replaced without the README.
  text = (HERE / "README.md").read_text()
  assert tables.replace_all(text, recovery.tables(HERE)) == text
