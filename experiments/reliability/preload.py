"""Imports all of a training run without asking for a device, for the server of `small.Child`."""

import flax  # noqa: F401
import grain  # noqa: F401
import tensorboardX  # noqa: F401

from moe_jax import train  # noqa: F401
from moe_jax.run import loop  # noqa: F401
