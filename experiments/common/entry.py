"""The guarded entry point and the reader of command lines of moe_jax.

Only this module knows where in moe_jax they live.
"""

from moe_jax.commands import guarded, parse

__all__ = ["guarded", "parse"]
