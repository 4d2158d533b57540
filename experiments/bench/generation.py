"""Times greedy decoding beside transformers' `generate`, with the same weights.

Both sides continue the same prompts with a model of Mixtral's architecture and random weights, in
float32, with two threads each, in interleaved rounds of one process. A round is a whole call, from
the prompts to the last token. transformers decodes eagerly with its own cache of keys and values
and its default implementation of the experts; its other ones can be chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench.dispatchers import Progress, environment
from experiments.common.command_line import check_counts, check_folder
from moe_jax.errors import ConfigError, choose
from moe_jax.generation import Sampling, generate_tokens

THREADS = 2
# On a machine with other work, torch's threads would otherwise take turns at waiting for each other
# in loops, and transformers would decode several times more slowly. torch reads it when it is
# imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Shape(NamedTuple):
  """The sizes of a model with top-2 of 8 experts in each layer.

  Attributes:
    d_model: The width of the model.
    d_ff: The hidden width of an expert.
    layers: The number of layers.
    heads: The number of query heads.
    vocab: The number of token ids.
    kv_heads: The number of key-value heads.
    head_dim: The width of a head.
  """

  d_model: int
  d_ff: int
  layers: int
  heads: int
  vocab: int
  kv_heads: int
  head_dim: int = 32


SHAPES = {"tiny": Shape(256, 512, 4, 8, 4096, 4), "small": Shape(512, 1024, 8, 16, 8192, 8)}
EXPERTS, CHOSEN, THETA, EPSILON = 8, 2, 1e6, 1e-5


def theirs(shape: Shape, implementation: str):
  """Returns transformers' model with random weights."""
  import torch
  from transformers import MixtralConfig, MixtralForCausalLM

  torch.manual_seed(0)
  torch.set_num_threads(THREADS)
  config = MixtralConfig(
    vocab_size=shape.vocab,
    hidden_size=shape.d_model,
    intermediate_size=shape.d_ff,
    num_hidden_layers=shape.layers,
    num_attention_heads=shape.heads,
    num_key_value_heads=shape.kv_heads,
    head_dim=shape.head_dim,
    num_local_experts=EXPERTS,
    num_experts_per_tok=CHOSEN,
    rms_norm_eps=EPSILON,
    rope_theta=THETA,
    max_position_embeddings=4096,
    sliding_window=None,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
  )
  if implementation:
    config._experts_implementation = implementation
  return MixtralForCausalLM(config).eval()


def ours(shape: Shape):
  """Returns this package's model of the same shape, without scanned layers."""
  from moe_jax import assembly, sharding

  return assembly.model(our_config(shape), shape.vocab, sharding.make_mesh({"data": 1}))


def our_config(shape: Shape):
  """Returns the config of this package's model of the same shape, without scanned layers."""
  from configs import base
  from moe_jax import assembly

  c = base.get_config()
  c.model.update(
    dict(
      d_model=shape.d_model,
      num_layers=shape.layers,
      num_heads=shape.heads,
      num_kv_heads=shape.kv_heads,
      head_dim=shape.head_dim,
      rope_theta=THETA,
      norm_eps=EPSILON,
      embed_scale=False,
      tied_embeddings=False,
      scan_layers=False,
    )
  )
  assembly.use_preset(c, "mixtral")
  c.model.moe.update(dict(first=0, every=1, num_experts=EXPERTS, d_ff=shape.d_ff))
  return c


def weights(model: Any, shape: Shape) -> dict[str, Any]:
  """Returns the variables of our model with the weights of transformers' model."""
  state = {name: value.numpy() for name, value in model.state_dict().items()}

  def heads(name: str, count: int) -> np.ndarray:
    """Returns a projection to heads as [D, H, P]."""
    return state[name].T.reshape(shape.d_model, count, shape.head_dim)

  params: dict[str, Any] = {
    "embedding": state["model.embed_tokens.weight"],
    "final_norm": {"scale": state["model.norm.weight"]},
    "head": state["lm_head.weight"].T,
  }
  for i in range(shape.layers):
    at = f"model.layers.{i}"
    gate_up = state[f"{at}.mlp.experts.gate_up_proj"].swapaxes(1, 2)
    params[f"layer_{i}"] = {
      "attention_norm": {"scale": state[f"{at}.input_layernorm.weight"]},
      "ffn_norm": {"scale": state[f"{at}.post_attention_layernorm.weight"]},
      "attention": {
        "query": heads(f"{at}.self_attn.q_proj.weight", shape.heads),
        "key": heads(f"{at}.self_attn.k_proj.weight", shape.kv_heads),
        "value": heads(f"{at}.self_attn.v_proj.weight", shape.kv_heads),
        "output": state[f"{at}.self_attn.o_proj.weight"].T.reshape(
          shape.heads, shape.head_dim, shape.d_model
        ),
      },
      "ffn": {
        "router": state[f"{at}.mlp.gate.weight"].T,
        "gate": gate_up[:, :, : shape.d_ff],
        "up": gate_up[:, :, shape.d_ff :],
        "down": state[f"{at}.mlp.experts.down_proj"].swapaxes(1, 2),
      },
    }
  return {"params": jax.tree.map(lambda leaf: jax.numpy.array(leaf, copy=True), params)}


def measure(
  shape: Shape, batches: list[int], options: argparse.Namespace, progress: Progress
) -> dict[str, dict[str, Any]]:
  """Times both sides for each batch size.

  Returns:
    Batch size -> {"transformers", "moe_jax": tokens/s (medians), "ratio": the median over rounds of
    ours by theirs, "equal": whether both sides gave the same tokens}.
  """
  import torch

  model = theirs(shape, options.experts)
  module, variables = ours(shape), weights(model, shape)
  keys = jax.random.split(jax.random.key(0), options.tokens)
  results = {}
  for batch in batches:
    prompts = np.random.default_rng(0).integers(1, shape.vocab, (batch, options.prompt))
    inputs = torch.tensor(prompts)

    def run_theirs(inputs=inputs) -> np.ndarray:
      with torch.inference_mode():
        return model.generate(
          inputs,
          attention_mask=torch.ones_like(inputs),
          do_sample=False,
          use_cache=True,
          max_new_tokens=options.tokens,
        )[:, options.prompt :].numpy()

    def run_ours(prompts=prompts) -> np.ndarray:
      return generate_tokens(module, variables, prompts.tolist(), keys, Sampling())

    rates: dict[str, list[float]] = {"transformers": [], "moe_jax": []}
    for number in range(options.repeats + 1):
      drawn = {}
      for name, run in (("transformers", run_theirs), ("moe_jax", run_ours)):
        progress(f"batch {batch}: {name}")
        start = time.perf_counter()
        drawn[name] = run()
        if number:  # the first round compiles and warms up
          rates[name].append(batch * options.tokens / (time.perf_counter() - start))
    results[str(batch)] = {name: float(np.median(values)) for name, values in rates.items()} | {
      "ratio": float(np.median(np.divide(rates["moe_jax"], rates["transformers"]))),
      "lowest_ratio": float(np.min(np.divide(rates["moe_jax"], rates["transformers"]))),
      "equal": bool((drawn["transformers"] == drawn["moe_jax"]).all()),
    }
  return results


def flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the verb."""
  parser.add_argument(
    "--shapes", default=",".join(SHAPES), help=f"comma-separated, of {', '.join(SHAPES)}"
  )
  parser.add_argument("--batches", default="1,8", help="batch sizes (%(default)s)")
  parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (%(default)s)")
  parser.add_argument("--tokens", type=int, default=128, help="tokens to draw (%(default)s)")
  parser.add_argument(
    "--repeats", type=int, default=7, help="timed rounds; medians are shown (%(default)s)"
  )
  parser.add_argument(
    "--experts",
    default="",
    help="transformers' implementation of the experts, such as eager or batched_mm",
  )
  parser.add_argument("--out", type=pathlib.Path, help="JSON file for the results")


def action(options: argparse.Namespace) -> int:
  """Does what the command line says and returns the exit code."""
  names = options.shapes.split(",")
  for name in names:
    choose("shapes", name, SHAPES)
  check_counts(options, prompt=1, tokens=1, repeats=1)
  check_folder("out", options.out)
  if not all(batch.isdecimal() and int(batch) for batch in options.batches.split(",")):
    raise ConfigError("batches", options.batches, "must be whole numbers with commas, such as 1,8")
  batches = [int(batch) for batch in options.batches.split(",")]
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ConfigError(
      "bench", "generation", "needs the extra [reference]; run make bench-generate"
    ) from error
  progress = Progress(len(names) * len(batches) * 2 * (options.repeats + 1))
  versions = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "threads": THREADS,
    "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
  }
  chosen = {name: getattr(options, name) for name in ("prompt", "tokens", "repeats", "experts")}
  report: dict[str, Any] = {"shapes": {}}
  print(f"{'':8}{'batch':>6}{'transformers':>20}{'moe_jax':>20}{'ratio':>7}{'lowest':>8}  tokens")
  for name in names:
    before = environment() | versions
    results = measure(SHAPES[name], batches, options, progress)
    progress.clear()
    for batch, r in results.items():
      print(
        f"{name:8}{batch:>6}{r['transformers']:>11.1f} tokens/s{r['moe_jax']:>11.1f} tokens/s"
        f"{r['ratio']:>7.2f}{r['lowest_ratio']:>8.2f}  {'equal' if r['equal'] else 'DIFFERENT'}",
        flush=True,
      )
    report["shapes"][name] = {
      "shape": SHAPES[name]._asdict(),
      "batches": results,
      "environment": before | {"load_average_after": os.getloadavg()},
      "options": chosen,
    }
  if options.out:
    options.out.write_text(json.dumps(report, indent=1) + "\n")
  return 0
