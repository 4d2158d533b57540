"""The analysis of a tiny run, from its weights to the files."""

import json
import re

import numpy as np
import pytest
import saved_run
import tokenizers
from interop import checkpoints

import moe_jax
from moe_jax.run import analyse as analysis

pytestmark = pytest.mark.smoke

WORDS = "the expert routes a token to one network\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("analyse")
  place, _ = saved_run.save(folder, model__num_layers=2, model__moe__every=1)
  (folder / "words.txt").write_text(WORDS * 20)
  (folder / "numbers.txt").write_text("".join(f"{i * i};" for i in range(200)))
  return moe_jax.load_run(place), [f"text:{folder}/{name}.txt" for name in ("words", "numbers")]


def test_every_token_of_every_domain_is_counted(run, tmp_path):
  # Catches a domain that gets the tokens of another one, padding that is counted, experts that are
  # shifted against their layers, and a file that does not hold what is returned.
  loaded, sources = run
  summary = moe_jax.analyse(loaded, sources, tokens=0, against=loaded, to=tmp_path / "page")
  assert json.loads((tmp_path / "page" / "analysis.json").read_text()) == summary
  result = summary["stacks"]["decoder"]
  assert (summary["run"], summary["step"], summary["against"]) == ("run", 3, 3)
  assert result["layers"] == ["layer 0", "layer 1"] and result["domains"] == sources
  # Every byte and the boundary before it is read once.
  assert result["tokens"] == [len(WORDS) * 20 + 1, sum(len(f"{i * i};") for i in range(200)) + 1]
  by_domain = np.array(result["by_domain"])
  assert by_domain.shape == (2, 2, 4)
  assert by_domain.sum(-1).tolist() == [result["tokens"]] * 2
  kinds = dict(zip(result["kinds"], result["tokens_by_kind"], strict=True))
  assert kinds["white space"] == 20 * 8 and kinds["special"] == 2 and kinds["punctuation"] == 200
  # The tokens are the same, and so are their experts.
  assert all(domain["changed"] == 0 for layer in result["churn"] for domain in layer)
  page = (tmp_path / "page" / "analysis.html").read_text()
  assert page.count('class="page"') == 4 and "Churn" in page
  with pytest.raises(moe_jax.ConfigError, match="has an analysis.html already"):
    moe_jax.analyse(loaded, sources, to=tmp_path / "page")


def test_text_of_a_batch():
  # Catches tokens of padding, and a successor in another document or row.
  segments = np.array([[1, 1, 2, 0], [1, 0, 0, 0]])
  arrays = {
    "segment_ids": segments,
    "tokens": np.arange(8).reshape(2, 4),
    "experts": np.zeros(3),
  } | {name: np.arange(8).reshape(1, 2, 4) for name in ("first", "second", "entropy", "top")}
  tokens = analysis._tokens(arrays, 5, 10)
  assert tokens["ids"].tolist() == tokens["first"][0].tolist() == [0, 1, 2, 4]
  assert tokens["row"].tolist() == [10, 10, 10, 11] and tokens["domain"].tolist() == [5] * 4
  assert tokens["follows"].tolist() == [False, True, False, False]


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"split": "test"}, "split"),
    ({"tokens": -1}, "tokens"),
    ({"batch_size": -1}, "batch_size"),
    ({"to": "no/such/folder"}, "cannot become one"),
  ],
)
def test_mistakes_come_before_the_run_is_loaded(changes, words):
  # Catches an error after minutes of work.
  with pytest.raises(moe_jax.ConfigError, match=words):
    moe_jax.analyse("no such run", **changes)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"model__moe__num_experts": 0}, "without experts"),
    ({"model__moe__soft_slots": 1, "model__moe__allow_noncausal_routing": True}, "Soft MoE"),
  ],
)
def test_models_without_choices_are_refused(tmp_path, changes, words):
  # Catches a page without a number.
  place, _ = saved_run.save(tmp_path, **changes)
  with pytest.raises(moe_jax.ConfigError, match=words):
    moe_jax.analyse(place)


def test_another_model_has_no_churn(run, tmp_path):
  # Catches a comparison of experts that have nothing to do with each other.
  place, _ = saved_run.save(tmp_path, model__moe__num_experts=2)
  with pytest.raises(moe_jax.ConfigError, match="of another model"):
    moe_jax.analyse(run[0], run[1], against=moe_jax.load_run(place))


@pytest.mark.every_variant
def test_an_encoder_decoder_has_two_stacks(tmp_path):
  # Catches sentinels that are counted as text, and decoders whose tokens are the encoder's.
  place, _ = saved_run.save(
    tmp_path,
    model__family="encoder_decoder",
    data__objective="span_corruption",
    data__encoder_len=48,
  )
  stacks = moe_jax.analyse(place, tokens=200)["stacks"]
  assert list(stacks) == ["encoder", "decoder"]
  sentinel = stacks["encoder"]["kinds"].index("sentinel")
  counts = [stack["tokens_by_kind"][sentinel] for stack in stacks.values()]
  assert 0 < counts[0] and 0 < counts[1] and sum(stacks["encoder"]["tokens"]) > 200


@pytest.mark.every_variant
def test_an_imported_checkpoint_is_read_with_its_tokenizer(tmp_path):
  # Catches tokens that are shown as bytes, and a second choice that top-2 routing has and the page
  # lacks.
  values = checkpoints.tensors("mixtral")
  settings = checkpoints.config("mixtral", torch_dtype="float32")
  folder = checkpoints.write(tmp_path / "published", values, settings)
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
  )
  bpe.train_from_iterator([WORDS], trainer)
  bpe.save(str(folder / "tokenizer.json"))
  moe_jax.from_hugging_face(folder, tmp_path / "run")
  (tmp_path / "words.txt").write_text(WORDS * 20)
  moe_jax.analyse(tmp_path / "run", [f"text:{tmp_path}/words.txt"], batch_size=1, to=tmp_path)
  result = json.loads((tmp_path / "analysis.json").read_text())["stacks"]["decoder"]
  assert sum(result["tokens"]) < 20 * len(WORDS) / 2 and len(result["layers"]) == 3
  assert result["repetition"][0][0]["either"] > result["repetition"][0][0]["first"]
  assert re.search(r'<i class="e\d">·expert</i>', (tmp_path / "analysis.html").read_text())
