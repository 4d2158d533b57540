"""Tests the output of `moe_jax.describe`, for small configs and for the largest one."""

import re
import subprocess
import sys

import pytest

from moe_jax import describe

pytestmark = pytest.mark.smoke


def described(capfd, *arguments):
  """Runs the command, which must succeed, and returns the lines that it prints."""
  assert describe.main(["describe", *arguments]) == 0
  out, err = capfd.readouterr()
  assert not err
  return out.splitlines()


def test_a_small_config_by_hand(capfd):
  # The numbers are computed by hand for D = 8, 2 heads of 4, F = 16 gated and V = 264 (bytes), as
  # in tests/accounts/counts_test.py, with an embedding of 2112. Adam keeps two float32 per
  # parameter and two counters.
  # Catches another vocabulary, and moments that are not counted.
  sizes = {
    "d_model": 8,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 4,
    "d_ff": 16,
    "moe.num_experts": 4,
    "moe.d_ff": 6,
    "moe.num_shared_experts": 1,
  }
  lines = described(
    capfd,
    "--config=configs/base.py",
    *(f"--config.model.{k}={v}" for k, v in sizes.items()),
    "--config.data.seq_len=16",
    "--config.paper.name=Mine",
    "--config.paper.parameters=4000",
  )
  text = "\n".join(lines)
  assert "weights: 3,800 parameters, 3,512 of them activated by a token" in text
  kinds = {
    name: int(count.replace(",", ""))
    for name, count in re.findall(r"^ {11}(.*?) {2,}([\d,]+) ", text, re.M)
  }
  assert kinds == {
    "embedding": 2112,
    "attention": 512,
    "dense FFN": 528,
    "experts": 576,
    "router": 32,
    "norms": 40,
  }
  flops = 2 * (3512 - 40) + 4 * 2 * 16 * 8
  assert f"flops: {flops:.4g} a token forward, {3 * flops:.4g} in training" in text
  assert (
    "memory: 15.2 kB of float32 weights, as much of gradients, 30.41 kB of adamw's state; about"
    in text
  )
  assert lines[-1].strip() == "paper: Mine claims 4000 parameters (ours -5.00%)"


def test_dense_models_and_notes(capfd):
  # Catches a routing section for a model without experts, a claim of 0 that is shown, and a note
  # that is lost.
  lines = described(capfd, "--config=configs/t5.py:large_geglu")
  assert not any("routing" in line or "activated (" in line for line in lines)
  assert lines[-1].strip() == (
    "paper: T5 claims 7.39e+08 parameters (ours +1.52%); Table 9's GEGLU FFN; ReLU of 4096 "
    "is 739M's"
  )


def test_claims_without_embedding_and_in_operations(capfd):
  # Catches an LSTM that is shown with attention and norms, and claims of Table 8 that are compared
  # with other counts.
  lines = described(capfd, "--config=configs/lstm_moe.py:news_131072_h")
  text = "\n".join(lines)
  assert (
    "lstm: 512 units, zero state at the start" in text
    and "no norms" in text
    and "attention" not in text
  )
  assert (
    "experts: relu, their output through a sigmoid" in text
    and "recurrence                 4,198,400" in text
  )
  assert lines[-1].strip() == (
    "paper: Shazeer et al. 2017 claims 1.377e+11 parameters (ours -0.01%), 1.37578e+11 "
    "without embedding and softmax (ours +0.00%), 9.7e+06 operations a time step (ours "
    "-0.01%)"
  )


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--config=configs/switch.py:d"], ["config='d'", "c_30_heads", "desk"]),
    (["--config=configs/mixtal.py"], ["no such file", "did you mean mixtral?"]),
    (["--config=configs/mixtral.py", "--config.model.d_modle=4"], ["did you mean model.d_model?"]),
    (
      ["--config=configs/mixtral.py", "--workdir=x"],
      ["--workdir", "the flags are --config, --config.KEY, --router, --debug"],
    ),
    (["--config=configs/mixtral.py", "--config.model.moe.router.top_k.k=9"], ["k=9"]),
    (["--config=configs/mixtral.py", "--config.model.vocab_size=0"], ["tokenizer.json"]),
  ],
)
def test_a_mistake_is_one_sentence(capfd, arguments, words):
  # Catches a traceback, and flags of training that would be ignored here.
  assert describe.main(["describe", *arguments]) == 2
  out, err = capfd.readouterr()
  assert not out and err.startswith("error: ") and err.count("\n") == 1
  assert all(word in err for word in words), err


def test_a_trillion_parameters_as_a_process():
  # Catches an allocation of the size of the model, which has 6 TB here. The command takes seconds;
  # the limit allows for a busy machine.
  done = subprocess.run(
    [sys.executable, "-m", "moe_jax.describe", "--config=configs/switch.py:c"],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
  assert "1,571,375,798,688 parameters, 1,795,152,288 of them" in done.stdout
