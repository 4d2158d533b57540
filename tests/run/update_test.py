"""The jitted step has the options of the config."""

import jax
import pytest
import tiny

from moe_jax import assembly, sharding
from moe_jax.run import update
from moe_jax.training import optimizers
from moe_jax.training import state as states

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
  "changes", [{}, {"train__accumulate_steps": 2}, {"train__output_z_loss": 0.1}]
)
def test_the_config_reaches_the_step_and_the_state_is_donated(tmp_path, changes):
  # Catches a key of config.train that is not passed on, and a state that is copied and thus held
  # twice in memory.
  config = tiny.config(tmp_path, **changes)
  mesh = sharding.make_mesh({"data": 1})
  model, (optimizer, schedule) = (
    assembly.model(config, 264, mesh),
    optimizers.make(optimizers.OptimizerOptions.of(config.optimizer), 6),
  )
  state, _ = states.create(mesh, model, optimizer, 0, config.data.seq_len, 4)
  row = jax.ShapeDtypeStruct((4, config.data.seq_len), "int32")
  batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), row)
  step = update.make(config, model, optimizer, schedule)
  traced = step.trace(state, batch)
  lowered = traced.lower()
  assert all(leaf.donated for leaf in jax.tree.leaves(lowered.args_info[0][0]))
  assert ("output_z" in lowered.out_info[1]) == ("train__output_z_loss" in changes)
  # Microbatches have the shape [steps, rows, length].
  assert ("i32[2,2,32]" in str(traced.jaxpr)) == ("train__accumulate_steps" in changes)
