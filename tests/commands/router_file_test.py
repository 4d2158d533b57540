"""Tests `--router=FILE.py:NAME`."""

import pytest

from moe_jax import assembly, commands
from moe_jax.assembly.sections import FUNCTIONS
from moe_jax.commands.router_file import load_router
from moe_jax.errors import ConfigError
from moe_jax.routing import ROUTERS

pytestmark = pytest.mark.unit

FILE = '''
import jax
import jax.numpy as jnp
from moe_jax.routing import Router, RoutingPlan

def mine(logits, context, *, k: int = 2):
  gate, expert = jax.lax.top_k(jax.nn.softmax(logits), k)
  token = jnp.broadcast_to(jnp.arange(logits.shape[0])[:, None], expert.shape)
  return RoutingPlan(
    token.ravel().astype(jnp.int32), expert.ravel(), gate.ravel(), logits.shape[1]
  )

def ranked(logits, context):
  """Each expert takes the tokens that like it best, of the whole group."""
  gate, token = jax.lax.top_k(jax.nn.softmax(logits).T, logits.shape[0] // 8)
  expert = jnp.broadcast_to(jnp.arange(logits.shape[1])[:, None], token.shape)
  return RoutingPlan(token.ravel(), expert.ravel().astype(jnp.int32), gate.ravel(), logits.shape[1])

declared = Router(mine, looks_ahead="overflow")
def top_k(logits, context):
  return mine(logits, context)

number = 3

def fails(logits, context):
  raise KeyError("salt")

def wrong(logits, context):
  return logits
'''


@pytest.fixture
def file(tmp_path):
  """Returns the path of a file with routers, and forgets what is registered from it afterwards."""
  routers, functions = dict(ROUTERS), dict(FUNCTIONS["model.moe.router"])
  path = tmp_path / "routers.py"
  path.write_text(FILE)
  yield path
  for table, before in ((ROUTERS, routers), (FUNCTIONS["model.moe.router"], functions)):
    table.clear()
    table.update(before)


def test_a_config_uses_the_router_and_has_its_options(file):
  # Catches a router that is known after the config was made, so that its options are no keys, and
  # one that is not chosen.
  argv = [
    "train",
    "--config=quickstart",
    f"--router={file}:mine",
    "--config.model.moe.router.mine.k=3",
  ]
  config = commands.parse(argv, workdir=False).config
  assert config.model.moe.router.name == "mine"
  assembly.validate(config)
  router = assembly.bind(FUNCTIONS["model.moe.router"], config.model.moe.router, "router")
  assert router.func.__name__ == "mine" and router.keywords == {"k": 3}


def test_whether_a_function_looks_ahead_is_tried(file):
  # Catches a router over the whole group that a causal model takes for one by token.
  assert load_router(f"{file}:mine")[1].leak() == "no"
  assert load_router(f"{file}:ranked")[1].leak() == "yes"
  assert load_router(f"{file}:declared")[1].leak() == "overflow"


@pytest.mark.parametrize(
  "name, words",
  [
    ("absent", "defines no router of that name"),
    ("number", "defines no router of that name"),
    ("fails", "KeyError: 'salt'"),
    ("wrong", "must return a moe_jax.RoutingPlan"),
    ("top_k", "is a router of moe_jax; give yours another name"),
    ("", "write --router=FILE.py:NAME"),
  ],
)
def test_a_wrong_router_is_one_sentence(file, name, words):
  # Catches a traceback out of the user's file, and a router of the package that is replaced.
  with pytest.raises(ConfigError, match=words):
    commands.parse(["train", "--config=quickstart", f"--router={file}:{name}"], workdir=False)


def test_a_wrong_file_is_one_sentence(tmp_path):
  # Catches a traceback for a missing file and for one with a mistake in it.
  (tmp_path / "broken.py").write_text("def mine(:\n")
  for name, words in (("no.py", "there is no Python file"), ("broken.py", "SyntaxError")):
    with pytest.raises(ConfigError, match=words):
      load_router(f"{tmp_path / name}:mine")
