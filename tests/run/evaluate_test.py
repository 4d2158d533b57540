"""Evaluation on text is compared with that of a training run."""

import math

import numpy as np
import pytest
import saved_run

import moe_jax
from moe_jax import data, sharding
from moe_jax.data.options import DataOptions
from moe_jax.run.evaluate import _measures, placed
from moe_jax.training import evaluate as evaluation

pytestmark = pytest.mark.smoke


def test_measures_are_those_of_the_training_run(tmp_path):
  # Catches another capacity, another cut of the text into rows, documents that are not held out,
  # and sums over bytes of another tokenizer.
  place, _ = saved_run.save(
    tmp_path, model__moe__capacity_factor=1.0, model__num_layers=2, model__moe__every=1
  )
  run = moe_jax.load_run(place)
  options = DataOptions.of(run.config.data)
  tokenizer, mesh = data.tokenizer_of(options), sharding.make_mesh({"data": 1})
  (source,) = data.make_sources(options)
  measure = evaluation.make_eval(options, 4, {}, run.model, mesh, tokenizer, [source])
  (total,) = measure(placed(run, mesh)).values()
  expected = evaluation.summary({"all": total})
  ((name, measures),) = moe_jax.evaluate(run).items()
  assert name == source.name
  assert measures["bits_per_byte"] == expected["bits_per_byte"]
  assert measures["loss"] == expected["loss/all"]
  assert measures["perplexity"] == pytest.approx(math.exp(expected["loss/all"]))
  assert measures["bytes"] == sum(map(len, source.documents("validation")))
  split = moe_jax.evaluate(run, mesh={"data": 2, "expert": 2})
  assert split[name]["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)


def test_other_text_is_read_as_a_whole(tmp_path):
  # Catches a part of foreign text that is left out, one short document that is refused, and a run's
  # own text of which the model has trained on a part.
  place, _ = saved_run.save(tmp_path)
  run = moe_jax.load_run(place)
  (tmp_path / "one.txt").write_text("the expert routes a token to one network\n")
  ((own, measures),) = moe_jax.evaluate(run, batches=1).items()
  assert measures["tokens"] == 4 * 32
  sources = [f"text:{tmp_path}/one.txt", own]
  results = moe_jax.evaluate(run, sources)
  assert list(results) == sources and results[sources[0]]["bytes"] == 41
  assert results[own] == moe_jax.evaluate(run, split="held_out")[own]
  everything = moe_jax.evaluate(run, split="all")[own]
  assert everything["bytes"] == sum(
    len(file.read_bytes()) for file in (tmp_path / "corpus").iterdir()
  )


def test_what_is_not_measured():
  # Catches bits per byte of span corruption, whose targets are a part of the text, and a division
  # by no tokens.
  total = {"nats": 6.0, "tokens": 2.0, "bytes": 4.0}
  assert _measures(total, "next_token")["bits_per_byte"] == pytest.approx(1.5 / math.log(2))
  assert np.isnan(_measures(total, "span_corruption")["bits_per_byte"])
  assert np.isnan(_measures(dict.fromkeys(total, 0.0), "next_token")["loss"])


@pytest.mark.parametrize(
  "options, words", [({"split": "test"}, "split"), ({"batches": -1}, "batches")]
)
def test_mistakes_are_one_sentence(options, words):
  # Catches an error that comes after the run was loaded.
  with pytest.raises(moe_jax.ConfigError, match=words):
    moe_jax.evaluate("no such run", **options)
