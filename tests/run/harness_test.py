"""Tasks of lm-evaluation-harness are compared with our own log-likelihoods and texts."""

import importlib.util
import math
import sys
import types

import local_tasks
import numpy as np
import pytest
import saved_run

import moe_jax
from moe_jax.run import harness
from moe_jax.run.scores import continuations, documents
from moe_jax.run.text_model import text_model

pytestmark = pytest.mark.smoke
HARNESS = pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is None, reason="needs the extra [eval]"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A model of random weights."""
  return text_model(saved_run.save(tmp_path_factory.mktemp("run"))[0])


@pytest.fixture
def offline(tmp_path, monkeypatch):
  """Forbids downloads, and lets the caches of datasets be below a folder of the test."""
  for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    monkeypatch.setenv(name, "1")
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  return local_tasks.write(tmp_path / "tasks")


@HARNESS
def test_tasks_equal_our_own_scores(text, offline):
  # Catches a pair whose parts are swapped, log-likelihoods of tokens instead of texts, and a text
  # that is not cut at what it stops at.
  results = harness.evaluate_tasks(
    text, ["choices", "text", "answer"], task_folder=offline, batch_size=2
  )
  right = []
  for question in local_tasks.QUESTIONS:
    pairs = [(question["question"], choice) for choice in question["choices"]]
    right.append(np.argmax([score for score, _ in continuations(text, pairs)]))
  labels = [question["label"] for question in local_tasks.QUESTIONS]
  assert results["choices"]["acc,none"] == np.mean(np.asarray(right) == labels)
  questions = [question["question"] for question in local_tasks.QUESTIONS]
  nats = -sum(documents(text, questions))
  assert results["text"]["bits_per_byte,none"] == pytest.approx(
    nats / sum(map(len, questions)) / math.log(2), rel=1e-6
  )
  answers = moe_jax.generate(text, questions, stop=[" ", "e"], max_tokens=6)
  targets = [question["choices"][0] for question in local_tasks.QUESTIONS]
  assert results["answer"]["exact_match,none"] == np.mean(np.asarray(answers) == targets)


@HARNESS
def test_few_shots_and_limits(text, offline):
  # Catches options that do not reach the harness.
  few = harness.evaluate_tasks(
    text, ["choices"], task_folder=offline, num_fewshot=1, limit=2, batch_size=2
  )
  assert 0 <= few["choices"]["acc,none"] <= 1
  with pytest.raises(moe_jax.ConfigError, match="tasks='chioces'.*choices"):
    harness.evaluate_tasks(text, ["chioces"], task_folder=offline)


@pytest.mark.parametrize(
  "options, expected",
  [
    ({}, ((), 256, 0.0, 0, 1.0)),
    ({"until": ["\n", ""], "max_gen_toks": 5, "do_sample": False}, (("\n",), 5, 0.0, 0, 1.0)),
    ({"until": "x", "temperature": 0.5}, (("x",), 256, 0.5, 0, 1.0)),
    ({"do_sample": True, "top_p": 0.9, "top_k": 3}, ((), 256, 1.0, 3, 0.9)),
    ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, ((), 256, 0.0, 0, 1.0)),
  ],
)
def test_options_of_the_harness(options, expected):
  # Catches a temperature without sampling, and a text to stop at that is empty.
  assert harness._options(options) == expected


def test_answers_keep_the_order_of_requests(text, monkeypatch):
  # Catches answers that come in the order of their options, and options of another request.
  def written(text, prompts, *, max_tokens, **others):
    return [f"{prompt} {max_tokens}" for prompt in prompts]

  monkeypatch.setattr(harness, "generate", written)
  lengths = [3, 2, 3, 3]
  requests = [(f"{i}", {"max_gen_toks": length}) for i, length in enumerate(lengths)]
  answers = harness._generate_until(text, requests, batch_size=2)
  assert answers == ["0 3", "1 2", "2 3", "3 3"]


def test_mistakes_are_one_sentence(text, tmp_path, monkeypatch):
  # Catches an ImportError where the extra is missing, and a folder that is searched in vain.
  with pytest.raises(moe_jax.ConfigError, match="task_folder"):
    harness.evaluate_tasks(text, ["choices"], task_folder=tmp_path / "nowhere")
  monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
  monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
  with pytest.raises(moe_jax.ConfigError, match=r"\.\[eval\]"):
    harness.evaluate_tasks(text, ["choices"])
