"""What the server of `small.Child` imports before it forks: all of a training run, and no
device."""

import flax  # noqa: F401
import grain  # noqa: F401
import tensorboardX  # noqa: F401

from moe_jax import train  # noqa: F401
from moe_jax.run import loop  # noqa: F401
