import pytest
import tiny
from surgery.workdir_test import train

from moe_jax import load_run
from moe_jax.surgery import __main__ as command

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
  """The workdir of a dense run, and its folder."""
  folder = tmp_path_factory.mktemp("surgery")
  with pytest.MonkeyPatch.context() as monkeypatch:
    config = tiny.config(folder, model__moe__num_experts=0)
    train(config, folder / "dense", 2, monkeypatch)
  return folder


SPARSE = ("--config.model.moe.num_experts=4", "--config.model.moe.d_ff=8")


@pytest.mark.parametrize(
  "args, experts",
  [
    (("upcycle", "dense", "a", *SPARSE, "--drop=0.5", "--seed=1"), 4),
    (("partition", "dense", "b", *SPARSE, "--method=inner", "--rows=8"), 4),
    (("expand", "a", "c", "--config.model.moe.num_experts=6", "--source=fresh"), 6),
  ],
  ids=["upcycle", "partition", "expand"],
)
def test_each_operation_makes_a_workdir(dense, capfd, args, experts):
  # Catches an operation whose flags do not reach it, and a sentence that cannot be pasted.
  operation, source, place, *rest = args
  if operation == "expand":
    command.main(["", "upcycle", str(dense / "dense"), str(dense / source), *SPARSE])
  else:
    place += "_"
  assert command.main(["", operation, str(dense / source), str(dense / place), *rest]) == 0
  assert f"--config={dense / place / 'config.py'}" in capfd.readouterr().out
  run = load_run(dense / place)
  assert run.config.model.moe.num_experts == experts
  (layer,) = (run.variables["params"][k] for k in run.variables["params"] if k.startswith("layer_"))
  assert layer["ffn"]["up"].shape[0] == experts


@pytest.mark.parametrize(
  "args, words",
  [
    (("upcycl", "dense", "x"), "did you mean"),
    (("upcycle", "dense"), "WORKDIR=None: is missing"),
    (("upcycle", "absent", "x", *SPARSE), "config="),
    (("upcycle", "dense", "x"), "no dense FFN would become experts"),
    (("upcycle", "dense", "x", *SPARSE, "--drop=2"), "drop='2'"),
    (("upcycle", "dense", "x", *SPARSE, "--method=inner"), "a flag of `surgery partition`"),
    (("partition", "dense", "x", *SPARSE), "method=''"),
    (("expand", "dense", "x", "--source=luck"), "source='luck'"),
    (("upcycle", "dense", "x", *SPARSE, "--step=9"), "step=9"),
    (("upcycle", "dense", "x", "--config.model.moe.num_expert=4"), "did you mean"),
  ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(dense, capfd, args, words):
  # Catches a traceback, and a workdir that is half made.
  operation, *rest = args
  paths = [str(dense / arg) if not arg.startswith("-") else arg for arg in rest]
  assert command.main(["", operation, *paths]) == 2
  said = capfd.readouterr().err
  assert words in said and said.count("\n") == 1 and not (dense / "x").exists()
