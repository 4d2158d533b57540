"""Tests which axes of a weight count layers and experts."""

import jax
import pytest
from changed import config
from flax import linen as nn

from moe_jax import assembly
from moe_jax.training import weight_paths

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"model.scan_layers": False},
    {
      "model.family": "encoder_decoder",
      "model.position": "relative",
      "model.ffn_bias": "multiplicative",
      "model.moe.num_shared_experts": 1,
    },
    {"model.position": "relative", "model.relative_shared": True},
    {"model.attention": "latent"},
  ],
)
def test_stacked_weights_are_those_whose_first_axes_are_layers_and_experts(changes):
  # Catches stacked weights under another name, and a dense FFN or attention that is taken for
  # experts.
  variables = assembly.abstract_variables(config({"model.num_layers": 6} | changes), 264)

  def boxed(leaf):
    return isinstance(leaf, nn.LogicallyPartitioned)

  leaves = jax.tree_util.tree_leaves_with_path(variables["params"], is_leaf=boxed)
  wanted = [sum(axis in ("layers", "expert") for axis in leaf.names) for _, leaf in leaves]
  assert [
    weight_paths.stacked(weight_paths.keys(path), leaf.value.ndim) for path, leaf in leaves
  ] == wanted
  assert max(wanted) == (1 if changes.get("model.scan_layers") is False else 2)
