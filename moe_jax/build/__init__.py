"""From ConfigDict to objects. Nothing outside this package reads `config.model`."""

from moe_jax.build.bind import bind
from moe_jax.build.counts import KINDS, flops_per_token, operations_per_step, parameter_counts, parameters_by_kind
from moe_jax.build.exchange import exchange_bytes
from moe_jax.build.experts import bias_update_rate, loss_weights, names_of_layers_with_experts
from moe_jax.build.memory import activation_bytes
from moe_jax.build.models import FAMILIES, abstract_variables, fixed_vocab_size, model
from moe_jax.build.presets import PRESETS, use_preset
from moe_jax.build.summary import model_summary, routing_summary
from moe_jax.build.validate import validate

__all__ = ["FAMILIES", "KINDS", "PRESETS", "abstract_variables", "activation_bytes", "bias_update_rate", "bind",
           "exchange_bytes", "fixed_vocab_size", "flops_per_token", "loss_weights", "model", "model_summary",
           "names_of_layers_with_experts", "operations_per_step", "parameter_counts", "parameters_by_kind",
           "routing_summary", "use_preset", "validate"]
