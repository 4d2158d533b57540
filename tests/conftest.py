"""Sets the environment of the tests before anything imports JAX; a mesh has eight CPU devices.

Nothing of moe_jax is imported here, because jaxtyping's import hook (see pyproject.toml) must come
first.
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
# A test's program runs only for a moment, and optimising its machine code would take ten times as
# long. The FLOPs and collectives that tests check are the same without it. The last flag depends on
# the version of jaxlib, because XLA ends the process if it does not know a flag.
QUICK = [
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
  QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *QUICK])

# Tracing creates very many objects that stay alive, and the garbage collector would spend much time
# on them.
gc.set_threshold(100_000)

# Programs that several tests, or the processes that they start, compile are compiled only once. The
# first process creates the folder of the cache. Its workers and the processes that tests start
# inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="moe_jax_compiled_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for `import reference`
sys.path.insert(0, str(ROOT))  # for `experiments` and `configs`, which are not installed

# The files whose tests take longest. They come first, so that at the end no worker is still busy
# with one of them while the others are idle.
LONG = (
  "families_test.py",
  "launch_test.py",
  "experiments/soak_test.py",
  "train_test.py",
  "models/encoder_decoder_test.py",
  "training/accumulate_test.py",
  "sharding/parallel_test.py",
  "models/language_model_test.py",
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
  """Moves the tests of the files in `LONG` to the front; all others keep their order."""
  rank = {str(ROOT / "tests" / name): number for number, name in enumerate(LONG)}
  items.sort(key=lambda item: rank.get(str(item.path), len(LONG)))
