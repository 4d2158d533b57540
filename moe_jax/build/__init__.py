"""From ConfigDict to objects. Nothing outside this package reads `config.model`."""

from moe_jax.build.bind import bind
from moe_jax.build.counts import flops_per_token, parameter_counts
from moe_jax.build.experts import bias_update_rate, loss_weights
from moe_jax.build.models import FAMILIES, model
from moe_jax.build.presets import PRESETS, use_preset
from moe_jax.build.summary import routing_summary
from moe_jax.build.validate import validate

__all__ = ["FAMILIES", "PRESETS", "bias_update_rate", "bind", "flops_per_token", "loss_weights", "model",
           "parameter_counts", "routing_summary", "use_preset", "validate"]
