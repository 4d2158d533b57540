"""Text generation: one forward pass over the prompts, and then one token of each row per step."""

from moe_jax.generation.decode import generate_tokens, stream_tokens
from moe_jax.generation.sampling import Sampling

__all__ = ["Sampling", "generate_tokens", "stream_tokens"]
