"""Studies and tools that use moe_jax; `python -m experiments` lists them."""
