"""Facts that follow from a config: parameters, FLOPs, bytes kept or sent, and text summaries."""

from moe_jax.accounts.counts import (
  KINDS,
  flops_per_token,
  operations_per_step,
  parameter_counts,
  parameters_by_kind,
)
from moe_jax.accounts.exchange import exchange_bytes
from moe_jax.accounts.memory import activation_bytes
from moe_jax.accounts.step_summary import step_summary
from moe_jax.accounts.summary import model_summary, routing_summary

__all__ = [
  "KINDS",
  "activation_bytes",
  "exchange_bytes",
  "flops_per_token",
  "model_summary",
  "operations_per_step",
  "parameter_counts",
  "parameters_by_kind",
  "routing_summary",
  "step_summary",
]
