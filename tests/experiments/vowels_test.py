"""Checks the data of the vowels, runs side by side, the t-test, and the README's tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.common import command_line, plots, tables
from experiments.vowels import data, make_tables, study, table, training
from moe_jax.errors import ConfigError
from moe_jax.models.mixture import AdaptiveMixture
from moe_jax.routing import mixture_errors

pytestmark = pytest.mark.unit


def synthetic() -> data.Cases:
  """Returns clusters near the men's four vowels, with two cases of each by 75 speakers."""
  means = np.array([[0.27, 2.29], [0.39, 1.99], [0.72, 1.09], [0.63, 1.19]])
  vowel, speaker = np.tile(np.arange(4), 150), np.repeat(np.arange(1, 76), 8)
  noise = np.random.default_rng(0).normal(scale=0.03, size=(600, 2))
  return data.Cases((means[vowel] + noise).astype(np.float32), vowel, speaker)


def test_labels():
  # Catches Praat's table from before 2008, in which ah, aa and ao were rotated, and formants in the
  # wrong columns.
  pytest.importorskip("parselmouth")
  cases = data.load()
  men = cases.of(range(1, 34))
  found = [men.formants[men.vowel == index].mean(0) for index in range(4)]
  np.testing.assert_allclose(
    found, [[0.267, 2.294], [0.392, 1.993], [0.718, 1.091], [0.631, 1.192]], atol=6e-4
  )
  assert len(cases.vowel) == 600 and set(cases.speaker) == set(range(1, 76))


@pytest.mark.parametrize("order", ["file", "random"])
def test_split(order):
  # Catches a speaker on both sides, halves of another size, cases split instead of speakers.
  train, test = data.split(synthetic(), order)
  assert (len(train.vowel), len(test.vowel)) == (400, 200)
  assert len(set(train.speaker)) == 50 and not set(train.speaker) & set(test.speaker)
  assert (set(train.speaker) == set(range(1, 51))) == (order == "file")


class Constant(nn.Module):
  """A network that answers its only weight, whatever the input is."""

  @nn.compact
  def __call__(self, x):
    answer = self.param("answer", nn.initializers.ones, ()) * jnp.ones((x.shape[0], 1))
    return jnp.ones((x.shape[0], 1)), answer[:, None]


def test_the_criterion_stops_each_run():
  # The error is w^2, its gradient 2w: with a step size of 0.25, w halves. From 1 the squared errors
  # are 1, 1/4, 1/16: two epochs to 0.08. 0.2 is there from the start; a step size of 0 never gets
  # there; one of 40 overflows. Catches: epochs off by one, a run that goes on after the criterion,
  # one that waits for it after overflow.
  begin = {"answer": jnp.array([1.0, 0.2, 1.0, 1.0])}
  runs = training.descend(
    Constant(),
    mixture_errors.cooperative,
    jnp.zeros((3, 2)),
    jnp.zeros((3, 1)),
    begin,
    jnp.array([0.25, 0.25, 0.0, 40.0]),
    0.08,
    30,
  )
  assert runs.epochs[:3].tolist() == [2, 0, 30] and runs.epochs[3] < 30
  assert runs.reached.tolist() == [True, True, False, False]
  np.testing.assert_allclose(runs.params["answer"][:3], [0.25, 0.2, 1.0])
  np.testing.assert_allclose(runs.curve[:4, 0], [1, 0.25, 0.0625, 0.0625])


@pytest.mark.every_variant
def test_seeds_side_by_side_are_the_seeds_alone():
  # Catches runs that share a gradient or a step size, one initialisation for all seeds, and a stop
  # for all at the first.
  cases, network = synthetic(), AdaptiveMixture(3, 4)
  target = data.TARGETS["classes"][cases.vowel]

  def run(seeds):
    return training.descend(
      network,
      mixture_errors.competitive,
      cases.formants,
      target,
      training.begin(network, seeds, 2),
      jnp.full(len(seeds), 4.0),
      0.12,
      400,
    )

  together, alone = run(range(3)), [run(range(seed, seed + 1)) for seed in range(3)]
  assert together.epochs.tolist() == [int(one.epochs[0]) for one in alone] and all(together.reached)
  assert len(set(together.epochs.tolist())) > 1
  for seed, one in enumerate(alone):
    jax.tree.map(
      lambda a, b, s=seed: np.testing.assert_allclose(a[s], b[0], rtol=1e-3, atol=1e-4),
      together.params,
      one.params,
    )


def test_a_row_of_the_table(monkeypatch):
  # Catches a step size other than the fastest, other initialisations for it, runs lost between
  # search and table.
  monkeypatch.setattr(study, "SEEDS", 2)
  monkeypatch.setattr(study, "SEARCHED", 2)
  monkeypatch.setattr(study, "STEP_SIZES", (0.5, 2.0))
  row, _, _ = study.run(synthetic(), study.Condition("classes"), "BP 6 hidden", "cooperative")
  found = row["search"][study.STEP_SIZES.index(row["step_size"])]
  assert found == min(n for n in row["search"] if n)
  assert found == pytest.approx(
    np.mean(row["epochs"]), abs=3
  )  # rounding differs with the number of runs side by side
  assert (
    row["parameters"] == 46
    and len(row["epochs"]) == len(row["test"]) == 2
    and row["in_use"] == [1, 1]
  )


def test_t_test():
  # Means 2 and 3, both variances 1, pooled 1: t = -1 / sqrt(2/3), four degrees of freedom. Catches:
  # Welch's test, a population's variance, the sign; p is Student's distribution at 1.2247
  # (two-sided).
  found = study.t_test([1, 2, 3], [2, 3, 4])
  assert found["t"] == pytest.approx(-(1.5**0.5)) and found["df"] == 4
  assert found["p"] == pytest.approx(0.2879, abs=1e-4)
  assert study.t_test(list(range(25)), list(range(25)))["df"] == 48


def test_experts_in_use():
  # Catches the largest gate taken for the mean, experts counted that the gate never picks.
  assert study.in_use(np.array([[0.98, 0.0, 0.02], [0.5, 0.5, 0.0]])).tolist() == [0, 1]


def test_the_readme_shows_the_results():
  # Catches a table typed by hand, and results replaced without the README.
  text = table.README.read_text()
  assert tables.replace_all(text, make_tables("desk")) == text


def test_a_missing_extra_is_one_sentence(monkeypatch, capsys):
  # Catches a traceback, or a sentence that does not say what to install.
  with pytest.raises(ConfigError, match=r"pip install -e '.\[studies\]'"):
    plots.need("no_such_module_of_the_extra")
  monkeypatch.setattr(data, "load", lambda: plots.need("no_such_module_of_the_extra"))
  assert command_line.main(["experiments", "vowels", "run"]) == 2
  assert command_line.main(["experiments", "vowels", "run", "--wrong"]) == 2
  assert capsys.readouterr().err.count("\n") == 2
