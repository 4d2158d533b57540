"""Cached decoding gives the tokens of transformers' `generate` with the same weights."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from experiments.bench import generation
from moe_jax.generation import Sampling, generate_tokens

pytestmark = pytest.mark.reference


def test_greedy_tokens_of_mixtral():
  # Catches a weight of the benchmark that is mapped to another place, rotations by other angles
  # after the prompt, and a cache that is off by one.
  shape = generation.Shape(d_model=32, d_ff=48, layers=2, heads=2, vocab=64)
  model = generation.theirs(shape, "")
  # With larger weights than the initial ones, no two logits are nearly equal.
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
  prompts = np.random.default_rng(0).integers(1, shape.vocab, (3, 5))
  inputs = torch.tensor(prompts)
  expected = model.generate(
    inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=12
  )
  keys = jax.random.split(jax.random.key(0), 12)
  drawn = generate_tokens(
    generation.ours(shape), generation.weights(model, shape), prompts.tolist(), keys, Sampling()
  )
  np.testing.assert_array_equal(drawn, expected[:, 5:].numpy())
  assert len(np.unique(drawn)) > 6
