"""Checks ST-MoE's ablations, the definition of instability, and tables of lines made by hand."""

import json
import math
import shlex

import numpy as np
import pytest

from experiments import st_moe_stability as study
from experiments.common import command_line, journal, outcomes, tables
from experiments.st_moe_stability import figures, findings, ngrams, paper, rows, table
from experiments.st_moe_stability.findings import Finding
from experiments.st_moe_stability.outcome import Mean, outcome
from experiments.st_moe_stability.stability import is_unstable, running_median
from moe_jax import accounts, assembly
from moe_jax.commands import parse

pytestmark = pytest.mark.unit
KNOWN = rows.ablations(rows.DESK)


def resolve(row):
  arguments = [argument for argument in row.arguments() if not argument.startswith("--seeds=")]
  return parse(["", *arguments], workdir=False).config


def flat(config):
  from ml_collections import config_dict

  found = {}
  for key, value in config.items():
    nested = isinstance(value, config_dict.ConfigDict)
    found |= (
      {f"{key}.{name}": leaf for name, leaf in flat(value).items()} if nested else {key: value}
    )
  return found


# A fall from 4 to 2 nats in 200 steps, after which nothing moves.
FALL = [4 - 2 * min(i, 200) / 200 for i in range(400)]


def changed(values, start, stop, by):
  return [value + by * (start <= i < stop) for i, value in enumerate(values)]


def test_a_running_median_by_hand():
  # Catches a window that looks ahead, that is centred, or that is a step too long.
  np.testing.assert_array_equal(
    running_median(np.array([1.0, 5.0, 2.0, 9.0, 3.0]), 3), [1, 3, 2, 5, 3]
  )


def test_what_is_stable():
  # Catches noise, a blip that the loss recovers from, a plateau or a wild beginning taken for a
  # divergence.
  noise = np.random.default_rng(0).normal(0, 0.15, 400)
  assert not is_unstable(FALL) and not is_unstable(FALL + noise)
  assert not is_unstable([4.0] + [3.0] * 399)  # learns little
  assert not is_unstable(
    changed(FALL, 250, 260, 5.0)
  )  # 10 steps: fewer than half of a window of 21
  assert not is_unstable(
    changed(FALL, 250, 280, 5.0)
  )  # moves the median, which is back within 40 steps
  assert not is_unstable(changed(FALL, 0, 30, 5.0))  # before step 40
  assert not is_unstable(changed(FALL, 250, 400, 0.49))  # less than 0.5 nats


def test_what_is_unstable():
  # Catches a smoothed loss compared with the last step instead of the least so far (also of the
  # steps that do not count), a rise that is not counted where the run ends in it, numbers that are
  # not finite skipped.
  assert is_unstable(changed(FALL, 250, 400, 0.51))  # stays
  assert is_unstable(changed(FALL, 250, 300, 5.0))  # returns after 50 steps, too late
  assert is_unstable(changed(FALL, 385, 400, 5.0))  # the run ends in it
  assert is_unstable(changed(FALL, 30, 400, 5.0))  # begins before step 40, and stays
  assert is_unstable([6.3] + [100.0] * 150 + [6.7] * 249)  # at once, and then it is dead
  assert is_unstable(
    [6.3] + [100.0] * 64 + [5.9] * 335
  )  # back within 40 steps that count, as good as chance
  assert is_unstable([6.3] * 400)
  assert is_unstable([*FALL[:300], None, *FALL[301:]]) and is_unstable(
    [*FALL[:300], math.inf, *FALL[301:]]
  )
  slow = [
    2 + 2 * max(i - 200, 0) / 200 for i in range(400)
  ]  # climbs for 200 steps, a hundredth a step
  assert is_unstable(slow)


def test_the_parameters_of_the_definition():
  # Catches a parameter that is not read.
  spike = changed(FALL, 250, 300, 5.0)
  assert not is_unstable(spike, patience=80) and not is_unstable(spike, rise=6.0)
  assert not is_unstable(spike, skipped=300)
  assert is_unstable(changed(FALL, 250, 260, 5.0), window=1, patience=10)
  assert is_unstable(FALL, learnt=2.1) and not is_unstable(FALL, learnt=1.9)


@pytest.mark.parametrize("name", KNOWN)
def test_a_row_changes_what_it_says_and_nothing_else(name):
  # Catches a row that is refused, that inherits more than its comparison's keys, that repeats
  # another because its key has the value already.
  desk = rows.rows(rows.DESK)
  mine = flat(resolve(desk[name]))
  assembly.validate(resolve(desk[name]), 1)
  assert desk[name].seeds == (6 if name == "baseline" else 3)
  if name == "baseline":
    return
  other = flat(resolve(desk[KNOWN[name].against]))
  assert {key for key in mine if mine[key] != other[key]} == set(KNOWN[name].changes)


def test_rows_are_those_of_the_paper():
  # Catches a claim of the paper that no row answers to, and stability compared with models that
  # have the z-loss.
  assert set(paper.CLAIMS) <= set(KNOWN)
  assert all(
    resolve(rows.rows(rows.DESK)[name]).model.moe.z_loss == 0.001
    for name in KNOWN
    if rows.is_design(name, KNOWN)
  )
  assert resolve(rows.rows(rows.DESK)["baseline"]).model.moe.z_loss == 0
  plain = resolve(rows.rows(rows.DESK)["no_geglu"])

  def of(config):
    return accounts.flops_per_token(config, 364)

  assert of(plain) == pytest.approx(of(resolve(rows.rows(rows.DESK)["baseline"])), rel=0.01)
  dense = accounts.parameter_counts(resolve(rows.rows(rows.DESK)["one_expert"]), 364)
  assert (
    dense[0]
    == dense[1]
    == pytest.approx(
      accounts.parameter_counts(resolve(rows.rows(rows.DESK)[rows.REFERENCE]), 364)[1], rel=0.01
    )
  )


@pytest.mark.every_variant
def test_the_commands_of_the_paper_size(capsys):
  # Catches rows that are not runs of moe_jax.train, a seed too few, anything printed beside the
  # commands, a size that is not T5-XL's, and a mesh on which it does not fit.
  assert command_line.main(["experiments", "st_moe_stability", "print", "--scale=paper"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 6 + 3 * (len(rows.ablations(rows.PAPER)) - 1)
  seen = set()
  for line in lines:
    python, flag, module, *arguments = shlex.split(line)
    assert (python, flag, module) == ("python", "-m", "moe_jax.train")
    read = parse(["", *arguments])
    seen.add((str(read.workdir).rpartition("_seed")[0], read.config.seed))
    assert read.workdir.name.endswith(f"_seed{read.config.seed}")
  assert len(seen) == len(lines)
  config = resolve(rows.rows(rows.PAPER)["baseline_seed5"])
  assembly.validate(config, 256)
  assert (config.model.d_model, config.model.num_layers, config.model.moe.num_experts) == (
    2048,
    24,
    32,
  )
  assert (
    config.train.batch_size * config.data.encoder_len == 2**20
    and config.optimizer.name == "adafactor"
  )


@pytest.mark.every_variant
def test_the_rows_of_one_gpu():
  # Catches a size that is not about 100M activated parameters, and one that is refused.
  config = resolve(rows.rows(rows.GPU)["multiplicative_bias"])
  assembly.validate(config, 1)
  assert 90e6 < accounts.parameter_counts(resolve(rows.rows(rows.GPU)["baseline"]), 364)[1] < 110e6
  assert set(rows.rows(rows.GPU)) == {name for name in KNOWN if "adamw" not in name}


@pytest.mark.every_variant
def test_the_rows_of_the_search(capsys):
  # Catches a search whose rows do not contain the base that it is said to have found.
  for row in rows.search().values():
    assembly.validate(resolve(row), 1)
  assert dict(rows.FRAGILE) in [dict(changes) for changes in rows.SEARCH.values()]
  assert command_line.main(["experiments", "st_moe_stability", "print", "--scale=search"]) == 0
  assert len(capsys.readouterr().out.splitlines()) == len(rows.SEARCH)


def line(name, nats, curves, diverged=None, logit=1.0):
  """Returns a line of results.jsonl with the nats and the loss curve of each seed."""
  row = rows.rows(rows.DESK)[name]
  return {
    "row": name,
    "arguments": row.arguments(),
    "seeds": len(nats),
    "steps": 400,
    "tokens": 96_000,
    "wall_seconds": 60.0,
    "date": "2000-01-31",
    "python": "3.11",
    "versions": {"jax": "0", "flax": "1"},
    "hardware": "cpu",
    "parameters": {"total": 2e6, "activated": 1e6},
    "mean_nats_per_target": nats,
    "diverged": diverged or [None] * len(nats),
    "load": {"step": [1]},
    "train": {
      "step": list(range(1, 401)),
      "cross_entropy": curves,
      "grad_norm": curves,
      "logit_max": [[logit + 0.01 * seed] * 400 for seed in range(len(nats))],
    },
  }


SPIKE = changed(FALL, 250, 400, 1.0)
CUT = [*FALL[:300], *[None] * 100]  # the seed that was not finite from step 301 on
LINES = {
  "baseline": line(
    "baseline", [2.0, 2.2, 5.0, None], [FALL, FALL, SPIKE, CUT], [None, None, None, 301], 8.0
  ),
  "z_loss_1e-3": line("z_loss_1e-3", [1.0, 1.2, 1.1], [FALL] * 3, logit=0.5),
  "update_clip": line("update_clip", [3.0, 3.3, 3.6], [FALL] * 3, logit=2.0),
  "dropout": line("dropout", [2.1, 2.3, 2.0], [FALL, FALL, SPIKE], logit=8.0),
  "top_2_1.25_2": line("top_2_1.25_2", [1.1, 1.2, 1.3], [FALL] * 3),
  "no_extra_ffn": line("no_extra_ffn", [1.5, 1.6, 1.7], [FALL] * 3),
  "multiplicative_bias": line("multiplicative_bias", [1.0, 1.1, 1.2], [FALL] * 3),
  "top_2_2_3": line("top_2_2_3", [1.0, 1.1, 1.2], [FALL] * 3),
  "threshold_0.05": line("threshold_0.05", [0.9, 1.1, 1.0], [FALL] * 3),
}


def test_a_seed_that_diverged_counts_as_unstable_and_not_in_the_quality():
  # Seeds of 2.0 and 2.2 nats are stable: -2.1 ± 0.1414 / sqrt 2 = 0.1. Catches: quality over all
  # seeds, a deviation in place of a standard error, a diverged seed whose curve ends before the
  # spike.
  found = outcome(LINES["baseline"])
  assert found.stable == (True, True, False, False) and found.count == "2/4"
  assert found.mean == Mean(pytest.approx(-2.1), pytest.approx(0.1))
  cut = LINES["baseline"] | {"train": {**LINES["baseline"]["train"], "cross_entropy": [FALL] * 4}}
  assert outcome(cut).stable == (True, True, True, False)


def test_differences_by_hand():
  # Catches standard errors that are added, a sign at less than two of them, and one where an error
  # is unknown.
  assert Mean(3, 0.3).minus(Mean(1, 0.4)) == Mean(2, 0.5)
  assert [Mean(*each).sign for each in ((1.1, 0.5), (-1.1, 0.5), (0.9, 0.5))] == [1, -1, 0]
  assert Mean.of([1.0]).sign is None and math.isnan(Mean.of([]).value)


def test_tables_by_hand():
  # Catches columns exchanged, the paper's numbers in our columns, and a difference to another row
  # than the named one.
  made = table.tables(LINES, {})
  stability, design = made["stability"].splitlines(), made["design"].splitlines()
  assert (
    stability[2]
    == "| `baseline` | no z-loss | 2/4 | -2.100 ± 0.100 |  | 8.03 | 2 | 4/6 | -1.755 ± 0.02 |  |"
  )
  # -1.1 + 2.1 = 1; errors 0.1 / sqrt 3 = 0.058 and 0.1: 0.115. The paper: -1.741 + 1.755.
  assert (
    "| `z_loss_1e-3` | z-loss 1e-3 | 3/3 | -1.100 ± 0.058 | +1.000 ± 0.115 | 0.52 | 4 | 3/3 | "
    "-1.741 ± 0.02 | +0.014 |"
  ) in stability
  assert (
    "4 minutes" in made["stability"]
    and "nats per target" in made["stability"]
    and "5 minutes" in made["design"]
  )
  assert design[2].endswith(
    "z-loss, extra FFN | 3/3 | -1.200 ± 0.058 |  | 1.02 | 8 |  | -1.369 |  |"
  )
  made = {each.split("`")[1]: each for each in design[2:] if each.startswith("| ")}
  assert "| -0.400 ± 0.082 |" in made["no_extra_ffn"]  # -1.6 + 1.2; the paper: -1.383 + 1.369
  assert made["no_extra_ffn"].endswith("| appendix C |  | -1.383 | -0.014 |")
  assert "from `top_2_2_3` | 3/3 | -1.000 ± 0.058 | +0.100 ± 0.082 |" in made["threshold_0.05"]
  assert made["threshold_0.05"].endswith("| 21 |  | -1.356 | -0.002 |")
  assert table.tables({}, {})["findings"] == table.NOTHING


def test_findings_by_hand():
  # Catches a verdict without the two standard errors, "no worse" that wants better, stability that
  # one seed decides.
  found = {name: outcome(each) for name, each in LINES.items()}
  verdicts = {
    each.words: findings.judge(each, found)[0]
    for each in findings.FINDINGS
    if {each.row, each.against} <= found.keys()
  }
  assert verdicts == {
    "The router z-loss makes training stable at no cost in quality": "holds",  # +1.000 ± 0.115
    "The router z-loss keeps the router's logits small": "holds",
    "With dropout it is stable and worse": "does not hold",  # a seed is not stable
    "With update clipping it is stable and worse": "holds",  # -3.3 + 2.1
    "An extra FFN before the experts helps": "holds",  # -1.2 + 1.6
    "A multiplicative FFN bias helps": "not decided",  # +0.1 ± 0.08, and +0.008 in the paper
  }
  worse = Finding("", "", "z_loss_1e-3", "baseline", stabilises=True, quality="worse")
  assert findings.judge(worse, found)[0] == "holds in part"  # stable, and better
  calm = found | {"baseline": found["z_loss_1e-3"]}
  assert findings.judge(findings.FINDINGS[0], calm)[0] == "not decided"  # nothing to stabilise
  assert all({each.row, each.against} <= set(KNOWN) for each in findings.FINDINGS)


def test_curves_that_nobody_reads_go(tmp_path):
  # Catches a line lost, and a curve lost that the tables need.
  path = tmp_path / "results.jsonl"
  path.write_text("".join(json.dumps(each) + "\n" for each in LINES.values()))
  study.thin(path)
  kept = {each["row"]: each for each in map(json.loads, path.read_text().splitlines())}
  assert table.tables(kept, {}) == table.tables(LINES, {})
  assert all("grad_norm" not in each["train"] and not each["load"] for each in kept.values())
  study.thin(tmp_path / "none.jsonl")


def test_figures_are_drawn(tmp_path):
  # Catches a curve with None, rows that are not finished.
  pytest.importorskip("matplotlib")
  figures.draw({name: outcome(each) for name, each in LINES.items()}, tmp_path)
  assert (tmp_path / "losses.png").stat().st_size > 10_000 and (
    tmp_path / "logits.png"
  ).stat().st_size > 10_000


def told(each, others):
  counted, words = study.STUDY.counted, study.STUDY.outcome
  return words(each, outcomes.describe(each, others, counted, study.STUDY.paired))


def test_what_a_finished_row_says():
  # Catches a quality over seeds that are not stable, the sign of the tables' quality on the measure
  # itself, and a comparison with the wrong row.
  words = told(LINES["dropout"], {"baseline": LINES["baseline"]})
  assert words == (
    "stable 2/3; 2.200 ± 0.100 nats per target over 2 of 3 seeds; +0.100 ± 0.141 compared with "
    "baseline; largest router logit 8.02"
  )
  unstable = line("dropout", [2.0, 2.5], [SPIKE, SPIKE])
  assert "stable 0/2; no seed is stable, 2.000, 2.500 nats per target;" in told(unstable, {})
  gone = {"row": "dropout", "arguments": [], "diverged": "training has diverged: at step 3"}
  assert told(gone, {}) == "training has diverged: at step 3"
  assert study.baseline("desk", "dropout") == "baseline" and not study.baseline("desk", "baseline")
  assert study.baseline("paper", "dropout_seed2") == "baseline_seed2"


def test_the_readme_shows_the_results():
  # Catches a table typed by hand, and results replaced without `python -m experiments
  # st_moe_stability write`.
  text = table.README.read_text()
  made = table.tables(journal.load(table.RESULTS), journal.load(table.SEARCH))
  assert set(made) == set(table.PARTS) and tables.replace_all(text, made) == text


def test_tables_of_counts_by_hand():
  # Three targets 0, 0, 1 are counted: p is (2 + 2/2, 1 + 2/2) / (3 + 2) = (0.6, 0.4). After the
  # input 0 come 0 and 1, after the input 1 comes 0: p(0 | 1) = (1 + 0.6) / 2 = 0.8. Catches padding
  # that counts, contexts that are swapped, and a table without smoothing.
  train = [
    {
      "targets": np.array([[0, 0, 1, 1]]),
      "inputs": np.array([[0, 1, 0, 1]]),
      "segment_ids": np.array([[1, 1, 1, 0]]),
    }
  ]
  held_out = [
    {"targets": np.array([[0, 1]]), "inputs": np.array([[1, 1]]), "segment_ids": np.array([[1, 0]])}
  ]
  assert ngrams.nats(train, held_out, (), 2) == pytest.approx(-math.log(0.6))
  assert ngrams.nats(train, held_out, ("inputs",), 2) == pytest.approx(-math.log(0.8))
