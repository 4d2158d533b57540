"""Describes the model of a config.

  python -m moe_jax.describe --config=configs/mixtral.py:8x7b [--config.key=value] [--debug]

It prints the architecture, the routing, the parameters, FLOPs and memory, and how far these are
from what the paper claims. Everything is computed from the shapes of the real model and optimizer;
no parameter is allocated, whatever the size. Exit code 2: the command is wrong, which one sentence
explains.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from moe_jax.commands import guarded, parse
from moe_jax.options import Config


def main(argv: Sequence[str]) -> int:
  """Prints the description and returns the exit code."""

  def say(rest: Sequence[str]) -> int:
    print(describe(parse(rest, workdir=False).config))
    return 0

  return guarded(argv, __doc__, say)


def describe(config: Config) -> str:
  """Returns the description of a config, one line for each question.

  Raises:
    ConfigError: The config is wrong, or it needs the size of a tokenizer that is not there.
  """
  from moe_jax import accounts, assembly

  assembly.validate(config)
  vocab_size = assembly.vocab_size(config)
  total, activated = accounts.parameter_counts(config, vocab_size)
  flops = accounts.flops_per_token(config, vocab_size)
  lines = [
    accounts.model_summary(config),
    accounts.routing_summary(config),
    accounts.step_summary(config, vocab_size),
    f"  weights: {total:,} parameters, {activated:,} of them activated by a token",
  ]
  lines += [
    f"{'':>11}{kind:<14}{count:>22,}{count / total:>9.2%}"
    for kind, count in accounts.parameters_by_kind(config, vocab_size).items()
    if count
  ]
  lines += [
    f"    flops: {flops:.4g} a token forward, {3 * flops:.4g} in training",
    _memory(config, vocab_size, total),
    _claim(config, vocab_size, total, activated),
  ]
  return "\n".join(line for line in lines if line)


def _memory(config: Config, vocab_size: int, total: int) -> str:
  import jax
  from flax import linen as nn

  from moe_jax import accounts, assembly
  from moe_jax.training import optimizers

  optimizer, _ = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), config.train.steps
  )
  moments = jax.eval_shape(
    optimizer.init, nn.unbox(assembly.abstract_variables(config, vocab_size)["params"])
  )
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(moments))
  kept = accounts.activation_bytes(config, vocab_size)
  return (
    f"   memory: {_bytes(4 * total)} of float32 weights, as much of gradients, {_bytes(held)} of "
    f"{config.optimizer.name}'s state; about {_bytes(kept)} of activations a row, saved for the "
    "backward pass"
  )


def _claim(config: Config, vocab_size: int, total: int, activated: int) -> str:
  """Returns the paper's claim and how far the counts are from it; "" if there is none."""
  from moe_jax import accounts

  paper, kinds = config.paper, accounts.parameters_by_kind(config, vocab_size)
  pairs = (
    (paper.parameters, total, "parameters"),
    (paper.activated, activated, "activated"),
    (paper.without_embedding, total - kinds["embedding"], "without embedding and softmax"),
    (paper.operations, accounts.operations_per_step(config, vocab_size), "operations a time step"),
  )
  words = [
    f"{claim:.6g} {what} (ours {count / claim - 1:+.2%})" for claim, count, what in pairs if claim
  ]
  said = [f"{paper.name} claims {', '.join(words)}"] * bool(words) + [paper.note] * bool(paper.note)
  return f"    paper: {'; '.join(said)}" if said else ""


def _bytes(count: int | float) -> str:
  """Returns a number of bytes in words, in units of 1000."""
  units = ("B", "kB", "MB", "GB", "TB")
  step = min(int(math.log10(max(count, 1)) / 3), len(units) - 1)
  return f"{count / 1000**step:.4g} {units[step]}"


if __name__ == "__main__":
  sys.exit(main(sys.argv))
