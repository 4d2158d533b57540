"""Surgery: makes the weights of one model from those of another.

Each operation is a pure function of weights by their unrolled names (`interop/unrolled.py`), so
that it does not matter which layers of either model are compiled as a scan:

    upcycle    copies of a dense FFN become experts (Komatsuzaki et al. 2022; granular; drop)
    partition  the hidden units of a dense FFN are divided among experts (LLaMA-MoE)
    expand     a layer gets more experts (Lifelong-MoE)
    inherit    a student takes over the weights besides the experts (Switch's distillation)

`python -m moe_jax surgery` does them on workdirs, and training goes on from the result.
"""

from moe_jax.surgery.expand import expand
from moe_jax.surgery.inherit import inherit
from moe_jax.surgery.partition import partition
from moe_jax.surgery.upcycle import upcycle

__all__ = ["expand", "inherit", "partition", "upcycle"]
