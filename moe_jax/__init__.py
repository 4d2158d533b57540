"""Mixture-of-Experts research in JAX. A token's way is the reading order of the package:

    routing   who goes where        (logits [S, E], context) -> RoutingPlan        pure functions of
                                    one group
    dispatch  how tokens travel     (plan, x [G, S, D], experts) -> y              one file a
                                    strategy, all equal
    experts   what is computed      weights as a pytree
    layers    Linen, thin           own the parameters, return (y, Aux)
    models    whole networks        token ids -> (logits, Aux)
    training  steps, state, optimizers, checkpoints
    assembly  these objects, made from a config and checked
    accounts  what a config costs: parameters, FLOPs, bytes, words
    run       one config from its first step to its report

Each imports only what stands above it. `data/`, `sharding/`, `hlo/` and `errors.py` may be imported
by all.

| letter | meaning                          | word       | meaning                          |
|--------|----------------------------------|------------|----------------------------------|
| B, L   | batch, sequence length           | token      | a row to route                   |
| G, S   | groups, tokens a group (BL = GS) | assignment | one (token, expert, gate)        |
| E, K, C| experts, experts a token, slots  | slot       | a position in an expert's buffer |
| A      | assignments a group              | load       | assignments an expert            |
| D, F   | model width, expert width        | gate       | combine weight                   |
| H, V   | heads, vocabulary                | Lm         | layers that have experts         |

Citations in docstrings: GShard (Lepikhin et al. 2020), Switch (Fedus et al. 2021), GLaM (Du et al.
2021), V-MoE (Riquelme et al. 2021), ST-MoE (Zoph et al. 2022), Expert Choice (Zhou et al. 2022),
DeepSeekMoE (Dai et al. 2024).
"""

import importlib

# Public name -> module; imported at first use, so that `import moe_jax` costs nothing.
_PUBLIC = {
  "Aux": "moe_jax.layers",
  "ConfigError": "moe_jax.errors",
  "DISPATCHERS": "moe_jax.dispatch",
  "LanguageModel": "moe_jax.models",
  "Experts": "moe_jax.experts",
  "MoeLayer": "moe_jax.layers",
  "ROUTERS": "moe_jax.routing",
  "RoutingContext": "moe_jax.routing",
  "RoutingPlan": "moe_jax.routing",
  "make_mesh": "moe_jax.sharding",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
  return [*globals(), *__all__]
