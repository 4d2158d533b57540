"""Eight CPU devices stand in for a mesh. The environment is set before anything imports JAX.

Nothing of moe_jax is imported here: jaxtyping's import hook (see pyproject.toml) must come first.
"""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for `import reference`
sys.path.insert(0, str(ROOT))  # for `experiments` and `configs`, which are not installed
