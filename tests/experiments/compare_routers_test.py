"""Checks the rows of the comparison, the arithmetic on their results, and the README's tables."""

import json
import math
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import command_line, tables
from experiments.compare_routers import figures, measures, study, table
from moe_jax import accounts, assembly
from moe_jax.assembly.experts import experts_a_token, looks_ahead
from moe_jax.commands import parse
from moe_jax.routing import ROUTERS, RoutingContext

pytestmark = pytest.mark.unit
SCALES = ("desk", "gpu")
VOCABULARY = 32_000  # of gpu's tokenizer, which is a file that nobody needs here


def config_of(row):
  return parse(
    ["", *(flag for flag in row.arguments() if flag.startswith("--config"))], workdir=False
  ).config


@pytest.fixture(scope="module", params=SCALES)
def configs(request):
  return {name: config_of(row) for name, row in study.rows(request.param).items()}


def test_rows_are_valid_and_have_three_seeds():
  # Catches a row that stops before it trains, a preset that is not put in, fewer routers than the
  # study promises.
  for scale in SCALES:
    rows = study.rows(scale)
    assert len(rows) >= 11 and all(row.seeds == 3 for row in rows.values())
    for name, row in rows.items():
      config = config_of(row)
      assembly.validate(config, 1)
      assert (config.model.moe.num_experts == 0) == (name == study.DENSE)


def test_activated_flops_agree(configs):
  # Catches experts whose width a preset's K or an override of it did not divide.
  size = assembly.fixed_vocab_size(next(iter(configs.values()))) or VOCABULARY
  flops = {name: accounts.flops_per_token(config, size) for name, config in configs.items()}
  assert max(flops.values()) < 1.02 * min(flops.values()), flops


def test_rows_differ_in_routing_only(configs):
  # Catches another learning rate, another order of the data, and another backbone in some row.
  def rest(config):
    found = config.to_dict()
    found["model"].pop("moe")
    return found

  first = rest(configs[study.DENSE])
  assert all(rest(config) == first for config in configs.values())
  assert (
    len({(c.model.moe.group_rows, c.model.moe.first, c.model.moe.every) for c in configs.values()})
    == 1
  )


def test_a_group_has_experts_of_one_shape(configs):
  # Catches a title that is not what its rows are, and rows of one group that differ in capacity to
  # learn.
  width = configs[study.DENSE].model.d_ff
  for group in study.GROUPS:
    for name in group.rows:
      e = configs[name].model.moe
      visited = (
        experts_a_token(configs[name].model, configs[name].data.seq_len) + e.num_shared_experts
      )
      assert (e.num_experts, visited, e.d_ff) == (
        group.experts,
        group.visited,
        width // group.visited,
      ), name


def test_who_sees_later_tokens(configs):
  # Catches a mark that is missing, and one that says "in training only" of a router that also looks
  # ahead at evaluation.
  logits = jax.random.normal(jax.random.key(0), (64, 16))
  later = logits.at[32:].set(jax.random.normal(jax.random.key(1), (32, 16)))
  context = RoutingContext(token_ids=jnp.zeros(64, jnp.int32), train=False)
  for name, config in configs.items():
    if name == study.DENSE:
      continue
    e, mark = config.model.moe, study.SEES.get(name)
    assert (looks_ahead(e) == "yes") == (mark in ("†", "‡")), name
    assert (looks_ahead(e) == "overflow" and e.capacity_factor is not None) == (mark == "§"), name
    if mark in ("†", "‡"):
      router = e.router
      plans = [
        ROUTERS[router.name].route(x, context, **router[router.name]) for x in (logits, later)
      ]
      early = [
        sorted(
          (int(t), int(e), float(g))
          for t, e, g in zip(p.token, p.expert, p.gate, strict=True)
          if t < 32
        )
        for p in plans
      ]
      assert (early[0] != early[1]) == (mark == "†"), name


def line(bits, *, curve=((20, 3.0),), seconds=0.1, **more):
  """Returns a line of results.jsonl.

  All seeds have the same curve, shifted so that it ends at the bits of the seed.
  """
  last = curve[-1][1]
  shifted = [[None if b is None else y - last + b for _, y in curve] for b in bits]
  return {
    "mean_bits_per_byte": list(bits),
    "diverged": [7 if b is None else None for b in bits],
    "seeds": len(bits),
    "steps": curve[-1][0],
    "tokens": curve[-1][0] * 8,
    "step_seconds": seconds,
    "step_cpu_seconds": 2 * seconds,
    "eval": {"step": [x for x, _ in curve], "bits_per_byte": shifted},
    "wall_seconds": 60.0,
    "parameters": {"total": 1_500, "activated": 900},
    "flops_per_token": 5e3,
    "date": "2000-01-31",
    "python": "3.11",
    "versions": {"jax": "0", "flax": "1"},
    "hardware": "cpu",
    "train": {},
  } | more


def routed(*args, **more):
  def of(*values):
    return [list(values)] * 3

  train = {
    "drop_rate": of(0.9, 0.9, 0.9, 0.9, 0.25),
    "dropped_tokens": of(1, 1, 1, 1, 0.125),
    "load_cv": of(9, 9, 9, 9, 0.5),
    "entropy": of(9, 9, 9, 9, 2.0),
    "logit_max": of(1, 30.5, None, 1, 2),
  }
  load = {"step": [4, 8], "layers": [[[1 / 16] * 16, [0.0] * 15 + [1.0]]] * 2}
  return line(*args, train=train, load=load, **more)


# Dense ends at 2, 2.1 and 2.2: mean 2.1, sample deviation 0.1, standard error 0.1 / sqrt(3) =
# 0.0577.
DENSE = line((2.0, 2.1, 2.2), curve=((10, 3.1), (20, 2.1)))


def test_means_and_standard_errors():
  # Catches the deviation of a population, a deviation in place of the error, and a diverged seed
  # that counts.
  assert measures.bits(DENSE) == pytest.approx((2.1, 0.1 / math.sqrt(3)))
  assert measures.bits(line((2.0, None, 3.0))) == pytest.approx(
    (2.5, math.sqrt(0.5) / math.sqrt(2))
  )
  assert measures.bits(line((2.0, None, None))) == (2.0, None)
  assert measures.bits(line((None, None, None))) == (None, None)
  late = line((2.0, 2.0, 2.0)) | {
    "diverged": [None, 3, None]
  }  # a gradient that was not finite, once
  assert measures.finite(late) == [0, 2]


def test_differences_are_paired():
  # Differences 0.1, 0.1 and 0.4: mean 0.2, deviations -0.1, -0.1 and 0.2, sample deviation
  # sqrt(0.06 / 2), error 0.1. 2 errors are not exceeded. Catches: errors of two independent means,
  # an exact bound that counts as exceeded.
  found = measures.difference(line((2.1, 2.2, 2.6)), DENSE)
  assert (found.mean, found.error) == pytest.approx((0.2, 0.1)) and found.errors == pytest.approx(
    2.0
  )
  assert not measures.difference(line((2.1, 2.2, 2.6 + 1e-6)), DENSE).exceeds
  # 0.1, 0.1, 0.25: mean 0.15, error sqrt(0.015 / 2) / sqrt(3) = 0.05: 3 errors.
  assert measures.difference(line((2.1, 2.2, 2.45)), DENSE).exceeds
  assert measures.difference(DENSE, line((2.1, 2.2, 2.45))).mean == pytest.approx(-0.15)
  assert not measures.difference(line((2.1, 1.9, 2.2)), DENSE).exceeds  # signs differ
  assert measures.difference(
    line((2.1, 2.2, 2.3)), DENSE
  ).exceeds  # the same in all seeds, but for rounding


def test_a_seed_that_diverged_is_in_no_difference_and_leaves_none_that_exceeds():
  # Catches None as a number, pairs of different seeds, and two seeds that are told apart as if they
  # were three.
  found = measures.difference(line((1.0, None, 1.3)), DENSE)
  assert (
    found.mean == pytest.approx(-0.95) and found.error == pytest.approx(0.05) and not found.exceeds
  )
  assert measures.difference(line((1.0, None, None)), DENSE) == (-1.0, None, False, None)
  assert measures.difference(line((None, None, None)), DENSE).mean is None


def test_steps_to_a_loss_are_interpolated():
  # From 3 at step 10 to 2 at step 20, 2.1 is reached after nine tenths: step 19. Catches: the next
  # evaluation's step, the last crossing, extrapolation, a curve of the diverged seeds.
  falling = line((2.0, 2.0, 2.0), curve=((10, 3.0), (20, 2.0)))
  assert measures.steps_to(falling, 2.1) == pytest.approx(19.0)
  assert measures.steps_to(falling, 3.5) == 10.0 and measures.steps_to(falling, 1.9) is None
  again = line((2.5, 2.5, 2.5), curve=((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.0), (50, 2.5)))
  assert measures.steps_to(again, 2.25) == pytest.approx(17.5)
  assert measures.steps_to(
    line((2.0, None, 2.0), curve=((10, 3.0), (20, 2.0))), 2.1
  ) == pytest.approx(19.0)
  assert measures.steps_to(DENSE, measures.bits(DENSE).mean) == 20.0


def lines():
  """Returns lines of four rows.

  Mixtral is 0.1, 0.1 and 0.25 below dense, one seed of hash diverged, and so did all of random.
  """
  return {
    "dense": DENSE,
    "random": line((None, None, None), step_seconds=None, step_cpu_seconds=None),
    "hash": routed((2.5, None, 2.5), curve=((10, 3.0), (20, 2.5)), seconds=0.15),
    "mixtral": routed((1.9, 2.0, 1.95), curve=((10, 2.95), (20, 1.95)), seconds=0.2),
  }


def test_a_summary_by_hand():
  # Mixtral's mean curve goes from 2.95 to 1.95 and is at 2.1 after 0.85 of the way: step 18.5, at
  # 0.4 s of CPU a step. Of five logged steps the last is a fifth. Catches: rates of the start of
  # training, logits of the end only, entropy of a router that reads no logits, times that are not
  # divided by dense's.
  found = measures.summary(lines())
  row = found["mixtral"]
  assert row["minus_dense"] == pytest.approx(-0.15) and row["minus_dense_se"] == pytest.approx(0.05)
  assert row["exceeds_seeds_spread"] and row["steps_to_dense"] == pytest.approx(18.5)
  assert row["seconds_to_dense"] == pytest.approx(7.4) and row["step_ms"] == pytest.approx(200)
  assert row["step_cpu_ms"] == pytest.approx(400) and row["step_over_dense"] == pytest.approx(2)
  assert row["logit_max"] == 30.5
  assert (row["drop_rate"], row["dropped_tokens"], row["load_cv"], row["router_entropy"]) == (
    0.25,
    0.125,
    0.5,
    2.0,
  )
  assert row["ln_experts"] == pytest.approx(2.7726, abs=1e-4)
  assert found["hash"]["finite_seeds"] == 2 and found["hash"]["router_entropy"] is None
  assert found["hash"]["steps_to_dense"] is None and found["hash"]["minus_dense"] == pytest.approx(
    0.4
  )
  assert found["random"]["bits_per_byte"] is None and found["random"]["finite_seeds"] == 0
  assert found["dense"]["minus_dense"] is None and found["dense"]["steps_to_dense"] == 20


def test_the_clock_is_that_of_the_hardware():
  # Catches CPU time of the process that only feeds a GPU, and wall time of a core that others took.
  assert measures.seconds_a_step(line((2.0,), seconds=0.1)) == pytest.approx(0.2)
  assert measures.seconds_a_step(
    line((2.0,), seconds=0.1, hardware="1 x NVIDIA H200")
  ) == pytest.approx(0.1)


def test_without_dense_nothing_is_compared_with_it():
  # Catches a traceback, and another row taken for the twin.
  left = {name: line for name, line in lines().items() if name != "dense"}
  found = measures.summary(left)
  assert {
    row[key]
    for row in found.values()
    for key in ("minus_dense", "steps_to_dense", "step_over_dense")
  } == {None}
  assert "dense" in table.text(left, "desk").split("missing")[0]


def test_a_line_of_a_run_that_stopped_at_once():
  # Catches a study that cannot be tabulated because a row's command ended with "diverged".
  found = measures.summary({"dense": DENSE, "switch": {"row": "switch", "diverged": "at step 1"}})
  assert found["switch"]["finite_seeds"] == 0 and found["switch"]["seeds"] == 3
  assert table.text({"switch": {"row": "switch", "diverged": "at step 1"}}, "desk")


def test_the_text_by_hand():
  # Catches columns exchanged, signs of the matrix turned round, and a study that is called finished
  # when rows are missing.
  made = table.text(lines(), "desk")
  assert "| `mixtral` | 1.950 ± 0.029 | **-0.150 ± 0.050** | 18 | 0.1 | 3/3 | 30.5 |" in made
  assert "| `random` | – | – | – | – | 0/3 | – |" in made
  assert "| `mixtral` | 2 of 16, half as wide | 25.0% | 12.5% | 0.50 | 2.00 | 2.77 |" in made
  assert "| `mixtral` | 200 | 400 | 2.00 | 1,500 | 900 | 5,000 |" in made
  assert (
    "Below the dense twin by more than the seeds' spread: `mixtral`; above it by more: none; "
    in made
  )
  assert "| `mixtral` | **-150 ± 50** | – | -575 ± 25 |" in made
  assert "1 of 6 pairs, 0 of them also by 4.303" in made
  assert (
    made.startswith("**The study has not been run to its end yet: switch, ")
    and "4 minutes in all" in made
  )
  assert "not been run to its end" in table.text({}, "desk")


def test_files(tmp_path, monkeypatch):
  # Catches JSON or CSV that other programs cannot read or that lack a row, figures that are no XML,
  # or draw a row that diverged, and a README whose text outside the markers is lost.
  monkeypatch.setitem(table.FOLDERS, "desk", tmp_path)
  (tmp_path / "README.md").write_text(
    "before\n<!-- table:compare_routers -->\nthe last one\n<!-- /table:compare_routers -->\nafter"
  )
  (tmp_path / table.RESULTS).write_text(
    "".join(json.dumps({"row": name} | one) + "\n" for name, one in lines().items())
  )
  table.write_files("desk")
  tables.write(tmp_path / "README.md", table.tables("desk"))
  readme = (tmp_path / "README.md").read_text()
  assert (
    readme.startswith("before\n") and readme.endswith("\nafter") and "the last one" not in readme
  )
  assert "-0.150" in readme and all(f"]({name})" in readme for name in figures.FILES)
  made = json.loads((tmp_path / "table.json").read_text())
  assert made["rows"]["mixtral"]["minus_dense"] == -0.15 and len(made["pairs"]) == 6
  head, *rows = (tmp_path / "table.csv").read_text().splitlines()
  assert [row.split(",")[0] for row in rows] == ["dense", "random", "hash", "mixtral"]
  assert rows[3].split(",")[head.split(",").index("step_ms")] == "200.0"
  for name in ("curves_1", "curves_2", "time", "load"):
    ElementTree.parse(tmp_path / f"{name}.svg")
    assert "nan" not in (tmp_path / f"{name}.svg").read_text().replace("data:image", "")[:20_000]
  assert (
    "mixtral" in (tmp_path / "curves_2.svg").read_text()
    and "random" not in (tmp_path / "time.svg").read_text()
  )
  assert (tmp_path / "load.svg").read_text().count("<image") == 4  # two routers of two layers


def test_the_command_line(capsys):
  # Catches flags of the sweep that do not arrive, and rows of both scales in one workdir.
  def printed(*arguments):
    return command_line.main(["experiments", "compare_routers", "print", *arguments])

  assert printed("--scale=desk", "--only=hash") == 0
  said = capsys.readouterr().out
  assert (
    said.count("python -m experiments.common.seeds") == 1
    and "runs/compare_routers/desk/hash" in said
  )
  assert "--config.model.moe=hash" in said and "--seeds=3 --apart" in said
  assert printed("--scale=gpu", "--only=dense", "--workdir=elsewhere") == 0
  assert "--workdir=elsewhere/dense" in capsys.readouterr().out
  assert printed("--scale=desk", "--only=nobody") == 2


def test_the_readmes_show_the_results():
  # Catches a table typed by hand, and results replaced without `python -m experiments
  # compare_routers write`.
  for scale, folder in table.FOLDERS.items():
    found = table.load(scale)
    readme = (folder / "README.md").read_text()
    assert tables.replace_all(readme, table.tables(scale)) == readme
    if found:
      summary = measures.summary(found)
      assert (folder / "table.csv").read_text() == table.as_csv(summary)
      assert (folder / "table.json").read_text() == table.as_json(found, summary)
      assert (folder / "time.svg").read_text() == figures.quality_by_time(found)
      assert np.isfinite(summary[study.DENSE]["bits_per_byte"])
