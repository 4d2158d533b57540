"""Checks what the search proposes, what a kill leaves of it, and how a candidate is measured."""

import concurrent.futures
import dataclasses
import json
import math
import random

import pytest
import tiny
from tqdm import tqdm

from experiments.brainformer_search import figures, search, table, trial
from experiments.brainformer_search import runner as study
from experiments.common import command_line
from experiments.common.journal import load
from moe_jax import assembly
from moe_jax.assembly.sublayers import kind, options
from moe_jax.errors import ConfigError
from moe_jax.models import SEARCH_SPACE

pytestmark = pytest.mark.unit
SPACE = search.desk_space(("top_2",))
GLAM = search.glam_block(SPACE)
EVOLUTION = search.Evolution(SPACE, population=4, sample=2)


def test_the_desks_space_is_the_papers_divided():
  # Catches a gate that sees the future by default, a number that is not scaled, and a baseline
  # outside of the space.
  assert SPACE["attention"] == {"width": (32, 48, 64), "heads": (3, 4, 5)}
  assert SPACE["moe"]["hidden"] == (96, 128, 192, 256) and SPACE["moe"]["gate"] == ("top_2",)
  assert SPACE["moe"]["capacity"] == SEARCH_SPACE["moe"]["capacity"]
  for entry in GLAM:
    assert all(value in SPACE[kind(entry)][name] for name, value in options(entry).items())
  c = trial.config(GLAM)
  assembly.validate(c, 1)
  assert c.model.d_model == 48 and not c.model.moe.allow_noncausal_routing
  assert (
    trial.config(("attention:width=32,heads=3", "moe:width=64,gate=expert_choice")).model.d_model
    == 64
  )


def test_all_candidates_are_valid():
  # Catches a proposal that no model can be built of.
  for n in range(4):
    block, parent = EVOLUTION.propose(n, [])
    assembly.validate(trial.config(block), 1)
    assert parent is None and len(block) == 8


def test_a_child_differs_in_one_sublayer_from_the_best_of_the_young():
  # Trial 0 has the highest reward but is too old for trials 6 and 7, whose parents are among 2 to
  # 5. Catches: a population that never ages, a tournament that its worst wins, a mutation of
  # several sublayers or of none.
  done = [
    (EVOLUTION.propose(n % 4, [])[0], reward)
    for n, reward in enumerate([9.0, 0.1, 0.2, 0.3, 0.4, 0.5])
  ]
  everyone = dataclasses.replace(EVOLUTION, sample=4)
  for evolution, parents in ((EVOLUTION, {3, 4, 5}), (everyone, {5})):
    for seed in range(40):
      block, parent = dataclasses.replace(evolution, seed=seed).propose(6, done)
      assert parent in parents
      assert sum(a != b for a, b in zip(block, done[parent][0], strict=True)) == 1
  later = EVOLUTION.propose(7, done + [(done[0][0], 99.0)])
  assert later == EVOLUTION.propose(7, done)  # trial 6 is of the same round


def test_reward_and_early_stop():
  # Catches a candidate stopped that loses on one count only, a reward of the wrong sign, NaN that
  # wins.
  assert (
    search.loses(1.1, 3.0, 2.9)
    and not search.loses(0.9, 3.0, 2.9)
    and not search.loses(1.1, 2.8, 2.9)
  )
  assert search.loses(1.1, math.nan, 2.9)
  assert (
    search.reward(2.0, 2.0, 2.5, 2.25, 2.6) == 0.25
    and search.reward(9.0, 0.5, 2.5, 2.25, 2.6) == -1
  )
  assert (
    search.reward(math.nan, 1.1, 3.0, 2.25, 2.6)
    == search.reward(math.nan, 0.5, None, 2.25, 2.6)
    == -1
  )
  done = [((), 0.3), ((), 0.2), ((), -1.0)]
  assert search.best(done, [1.2, 0.9, 0.5]) == 1 and search.best(done, [1.2, 1.1, 0.5]) is None


class Now(concurrent.futures.Executor):
  """An executor that runs each task at once, and refuses to run more than `limit` tasks."""

  def __init__(self, limit=10**6):
    self.limit = limit

  def submit(self, function, task):
    if not self.limit:
      raise KeyboardInterrupt
    self.limit -= 1
    future = concurrent.futures.Future()
    future.set_result(function(task))
    return future


def fake(task):
  """Returns a line for a block without training it, which is the same for each call."""
  draw = random.Random(repr((task.block, task.seed)))
  line = {
    "block": list(task.block),
    "seed": task.seed,
    "bits_per_byte": 2 + draw.random(),
    "quarter": 4.0,
    "relative_step": 0.5 + draw.random(),
    "stopped": False,
    "steps": task.steps,
    "train_seconds": 0.05 * task.steps,
    "cpu_seconds": 5 + 0.05 * task.steps,
    "parameters": 10**6,
    "activated": 10**5,
  }
  lost = task.glam_quarter is not None and draw.random() < 0.2
  return line | ({"stopped": True, "bits_per_byte": None} if lost else {})


def searched(path, limits=(10**6,)):
  for limit in limits:
    journal = study.Journal(path)
    journal.head(
      {"seed": 0},
      {"command": "", "date": "", "cores": 2, "python": "", "versions": {"jax": "", "flax": ""}},
    )
    try:
      study.run(journal, EVOLUTION, 500.0, Now(limit), tqdm(disable=True), fake)
    except KeyboardInterrupt:
      pass
  return journal


def test_a_resumed_search_is_the_uninterrupted_one(tmp_path):
  # Killed within a round, between rounds and in the finals. Catches: a population that is not
  # rebuilt, a proposal that depends on what this process has drawn before, a line that is run
  # twice.
  whole = searched(tmp_path / "whole.jsonl")
  parts = searched(tmp_path / "parts.jsonl", (1, 4, 3, 13, 10**6))
  assert parts.lines == whole.lines and parts.lines == load(tmp_path / "parts.jsonl")
  trials = len(whole.trials)
  assert trials > 16 and 480 < whole.spent < 520  # the finals' time was kept for them
  assert any(line["parent"] is not None and line["parent"] >= 4 for line in whole.trials)
  assert {row for row in whole.lines if row.startswith("final")} == {
    f"final_{name}_{seed}" for name in ("best", "glam") for seed in (1, 2, 3)
  }
  chosen = search.best(whole.done, [line["relative_step"] for line in whole.trials])
  assert whole.lines["final_best_2"]["block"] == list(whole.done[chosen][0])
  assert f"{trials} trials" in table.table(whole)


def test_another_search_in_the_same_journal_is_refused(tmp_path):
  # Catches trials of two spaces or budgets mixed in one population.
  searched(tmp_path / "r.jsonl")
  with pytest.raises(ConfigError, match="seed=1: the search in"):
    study.Journal(tmp_path / "r.jsonl").head({"seed": 1}, {})


def test_the_command_line(tmp_path, capsys):
  # Catches a search that begins without being asked, and a table of a search that has hardly begun
  # that crashes.
  results = tmp_path / "none.jsonl"
  command = ["experiments", "brainformer_search", f"--results={results}"]
  assert command_line.main(command) == 2
  assert "known: run, write" in capsys.readouterr().err and not results.exists()
  journal = searched(tmp_path / "r.jsonl", (5,))
  assert "goes on from there" in table.table(journal)


@pytest.mark.parametrize(
  "found, glam, words",
  [
    ([2.0, 2.1], [2.2, 2.3], "ahead: each"),
    ([2.0, None], [2.2, 2.3], "neither"),
    ([2.0, 2.25], [2.2, 2.3], "neither"),
    ([2.4, 2.5], [2.2, 2.3], "behind"),
  ],
)
def test_the_verdict_asks_for_more_than_the_spread(found, glam, words):
  # Catches a mean taken for a result.
  lines = {
    name: [{"bits_per_byte": b} for b in bits] for name, bits in (("best", found), ("glam", glam))
  }
  assert words in table.verdict(lines)


def test_weights_that_a_token_meets():
  # Catches one expert counted for two, and a third matrix forgotten.
  assert figures.met("attention:width=48,heads=3") == 4 * 48 * 48
  assert figures.met("ffn:width=48,hidden=96,activation=reglu") == 3 * 48 * 96
  assert (
    figures.met("moe:width=48,hidden=96,activation=relu,gate=top_2,capacity=1") == 2 * 2 * 48 * 96
  )


@pytest.mark.smoke
def test_a_candidate_is_trained_and_measured(tmp_path, monkeypatch):
  # Catches a clock that compiling moves, and a candidate that is stopped though it is as fast as
  # GLaM's.
  def small(block, seed=0):
    return tiny.config(
      tmp_path,
      model__family="brainformer",
      model__block=tuple(block),
      model__num_layers=1,
      model__moe__num_experts=4,
      seed=seed,
    )

  monkeypatch.setattr(trial, "config", small)
  monkeypatch.setattr(trial, "BATCHES", 8)
  for name, value in (("ROWS", 4), ("EVAL_ROWS", 4), ("SEQ_LEN", 32), ("EVAL_BATCHES", 1)):
    monkeypatch.setattr(trial, name, value)
  trial._text.cache_clear()
  block = ("attention", "moe:gate=top_2,capacity=2")
  line = trial.measure(trial.Task(block, block, 0, 12))
  trial._text.cache_clear()
  trial._GLAM.clear()
  assert not line["stopped"] and 0 < line["bits_per_byte"] < 9 and 0 < line["quarter"] < 9
  assert (
    line["train_seconds"] >= 12 * line["unit_seconds"] > 0
    and line["cpu_seconds"] > line["train_seconds"]
  )
  assert json.loads(json.dumps(line)) == line
