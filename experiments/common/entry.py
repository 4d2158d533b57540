"""The guarded entry point, the reader of command lines and the allocator of moe_jax.

Only this module knows where in moe_jax they live.
"""

from moe_jax.commands import guarded, parse
from moe_jax.commands.allocator import keep_memory

__all__ = ["guarded", "keep_memory", "parse"]
