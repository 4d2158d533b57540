"""Mixture-of-Experts models for research in JAX.

The package is best read in the order in which a token passes through it:

    routing   Assigns tokens to experts: (logits [S, E], context) -> RoutingPlan. Routers are pure
              functions of one group of tokens.
    dispatch  Moves tokens to their experts and back: (plan, x [G, S, D], experts) -> y. Each
              strategy has a file, and all compute the same function.
    experts   The computation of the experts, with weights as a pytree.
    layers    Thin Linen modules that own the parameters and return (y, Aux).
    models    Whole networks: token ids -> (logits, Aux).
    generation Decoding with a cache, and sampling.
    training  Training steps, training state, optimizers and checkpoints.
    assembly  Checks a config and builds these objects from it.
    accounts  Computes what a config costs in parameters, FLOPs and bytes, and describes it.
    analysis  What experts specialise in: statistics of recorded routing.
    report    The pages about runs and about experts.
    run       Runs one config from its first step to its report.
    interop   Reads and writes published checkpoints.
    surgery   Makes the weights of one model from those of another.

Each of them imports only those above it. `data/`, `sharding/`, `hlo/` and `errors.py` may be
imported by all.

In shapes, formulas and names:

| letter | meaning                          | word       | meaning                          |
|--------|----------------------------------|------------|----------------------------------|
| B, L   | batch, sequence length           | token      | a row to route                   |
| G, S   | groups, tokens a group (BL = GS) | assignment | one (token, expert, gate)        |
| E, K, C| experts, experts a token, slots  | slot       | a position in an expert's buffer |
| A      | assignments a group              | load       | assignments an expert            |
| D, F   | model width, expert width        | gate       | combine weight                   |
| H, V   | heads, vocabulary                | Lm         | layers that have experts         |

Docstrings cite these papers by name: GShard (Lepikhin et al. 2020), Switch (Fedus et al. 2021),
GLaM (Du et al. 2021), V-MoE (Riquelme et al. 2021), ST-MoE (Zoph et al. 2022), Expert Choice (Zhou
et al. 2022), DeepSeekMoE (Dai et al. 2024).
"""

import importlib
import itertools
import sys
from typing import TYPE_CHECKING

from moe_jax.errors import jax_is_missing

# `python -m moe_jax.train` imports this package first. Without JAX it would end in a traceback.
# `python -m moe_jax` asks by itself, because some of its answers need no JAX.
_RUN = next((name for flag, name in itertools.pairwise(sys.orig_argv) if flag == "-m"), "")
if sys.argv[:1] == ["-m"] and _RUN.startswith("moe_jax.") and jax_is_missing():
  sys.exit(1)

# Type checkers do not see the imports of `__getattr__` below.
if TYPE_CHECKING:
  from moe_jax.assembly.layer import moe_layer
  from moe_jax.dispatch import DISPATCHERS
  from moe_jax.errors import ConfigError
  from moe_jax.experts import Experts
  from moe_jax.interop import from_hugging_face, to_hugging_face
  from moe_jax.layers import Aux, LayerContext, LossOptions, MoeLayer
  from moe_jax.models import LanguageModel
  from moe_jax.routing import ROUTERS, Router, RoutingContext, RoutingPlan
  from moe_jax.run.analyse import analyse
  from moe_jax.run.evaluate import evaluate
  from moe_jax.run.generate import generate
  from moe_jax.run.load import load_run
  from moe_jax.sharding import make_mesh

# Public name -> the module that defines it. Modules are imported when a name is first used, so that
# `import moe_jax` takes no time.
_PUBLIC = {
  "Aux": "moe_jax.layers",
  "ConfigError": "moe_jax.errors",
  "DISPATCHERS": "moe_jax.dispatch",
  "LanguageModel": "moe_jax.models",
  "Experts": "moe_jax.experts",
  "LayerContext": "moe_jax.layers",
  "LossOptions": "moe_jax.layers",
  "MoeLayer": "moe_jax.layers",
  "ROUTERS": "moe_jax.routing",
  "Router": "moe_jax.routing",
  "RoutingContext": "moe_jax.routing",
  "RoutingPlan": "moe_jax.routing",
  "analyse": "moe_jax.run.analyse",
  "evaluate": "moe_jax.run.evaluate",
  "from_hugging_face": "moe_jax.interop",
  "generate": "moe_jax.run.generate",
  "load_run": "moe_jax.run.load",
  "make_mesh": "moe_jax.sharding",
  "moe_layer": "moe_jax.assembly.layer",
  "to_hugging_face": "moe_jax.interop",
}

__all__ = [
  "DISPATCHERS",
  "ROUTERS",
  "Aux",
  "ConfigError",
  "Experts",
  "LanguageModel",
  "LayerContext",
  "LossOptions",
  "MoeLayer",
  "Router",
  "RoutingContext",
  "RoutingPlan",
  "analyse",
  "evaluate",
  "from_hugging_face",
  "generate",
  "load_run",
  "make_mesh",
  "moe_layer",
  "to_hugging_face",
]


def __getattr__(name: str):
  """Imports the module of a public name and returns the object with this name."""
  if name not in _PUBLIC:
    raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
  """Lists the public names, including those that have not been imported yet."""
  return [*globals(), *__all__]
