"""The guarded entry point of moe_jax's commands: the only module here that knows where it lives."""

from moe_jax.train import guarded

__all__ = ["guarded"]
