"""Eight CPU devices stand in for a mesh. The environment is set before anything imports JAX.

Nothing of moe_jax is imported here: jaxtyping's import hook (see pyproject.toml) must come first.
"""

import importlib.metadata
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# A program of a test runs for a moment, and optimising its machine code would take ten times as long. The FLOPs and
# collectives that tests assert are the same. XLA ends the process for a flag that it does not know.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
         "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
  QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *QUICK])

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for `import reference`
sys.path.insert(0, str(ROOT))  # for `experiments` and `configs`, which are not installed

# Files whose tests take longest. They come first, so that no process is left alone with one at the end.
LONG = ("train_test.py", "launch_test.py", "experiments/soak_test.py", "families_test.py",
        "models/encoder_decoder_test.py", "experiments/seeds_test.py", "training/accumulate_test.py",
        "sharding/parallel_test.py", "experiments/reliability_test.py", "models/brainformer_test.py",
        "models/decoder_test.py", "training/step_test.py")


def pytest_collection_modifyitems(items):
  """Puts the tests of `LONG` first; all others keep their order."""
  rank = {str(ROOT / "tests" / name): number for number, name in enumerate(LONG)}
  items.sort(key=lambda item: rank.get(str(item.path), len(LONG)))
