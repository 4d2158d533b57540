"""Published checkpoints of Hugging Face's safetensors, in and out.

The families that can be read and written are those of `families`; docs/interop.md lists them.
"""

from moe_jax.interop.hugging_face import from_hugging_face, to_hugging_face

__all__ = ["from_hugging_face", "to_hugging_face"]
