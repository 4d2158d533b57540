"""Eight CPU devices stand in for a mesh. The environment is set before anything imports JAX.

Nothing of moe_jax is imported here: jaxtyping's import hook (see pyproject.toml) must come first.
"""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# A program of a test runs for a moment, and optimising its machine code would take ten times as
# long. The FLOPs and collectives that tests assert are the same. XLA ends the process for a flag
# that it does not know.
QUICK = [
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
  QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *QUICK])

# Tracing makes very many objects that live on, and looking for garbage among them takes time.
gc.set_threshold(100_000)

# What several tests, or the programs that they start, compile is compiled once. The first process
# makes the folder; its workers and the programs inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="moe_jax_compiled_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for `import reference`
sys.path.insert(0, str(ROOT))  # for `experiments` and `configs`, which are not installed

# Files whose tests take longest. They come first, so that no process is left alone with one at the
# end.
LONG = (
  "families_test.py",
  "launch_test.py",
  "experiments/soak_test.py",
  "train_test.py",
  "models/encoder_decoder_test.py",
  "training/accumulate_test.py",
  "sharding/parallel_test.py",
  "models/decoder_test.py",
  "dispatch/conformance_test.py",
  "experiments/common/seeds_test.py",
  "training/step_test.py",
  "experiments/reliability_test.py",
  "layers/moe_test.py",
  "models/brainformer_test.py",
  "models/lstm_test.py",
  "configs_test.py",
  "papers_test.py",
  "experiments/st_moe_stability_test.py",
  "dryrun/dispatchers_test.py",
  "experiments/scaling_laws_test.py",
  "experiments/bench_test.py",
)


def pytest_collection_modifyitems(items):
  """Puts the tests of `LONG` first; all others keep their order."""
  rank = {str(ROOT / "tests" / name): number for number, name in enumerate(LONG)}
  items.sort(key=lambda item: rank.get(str(item.path), len(LONG)))
