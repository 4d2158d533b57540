"""Trains a model.

  python -m moe_jax.train --config=configs/quickstart.py --workdir=DIR [--config.KEY=VALUE ...]

The same command with the same workdir continues where the run stopped. Ctrl-C and SIGTERM save and
stop, and so does --config.train.max_minutes=N, for batch queues that end a job by the clock.

On a pod or a cluster each process runs this same command (`moe_jax/distributed.py`), with
--distributed=HOST:PORT,N,INDEX where nothing in the environment says how they find each other.

`--config.model.moe=NAME` puts the routing of a paper into the config; `python -m moe_jax.routers`
lists the names. `--help=SECTION` prints the keys of a section of the config (run, model,
model.latent, model.rope, model.moe, model.moe.router, model.moe.dispatcher, data, optimizer, train,
train.guard, mesh, sharding, paper, report), and `--help=all` prints all of them.

Compiled programs are kept in the cache folder, ~/.cache/moe_jax or data.cache_dir, so that a second
start is faster; JAX_ENABLE_COMPILATION_CACHE=false switches that off.

--router=FILE.py:NAME trains with a router of your own file; NAME is its function, or a `Router`.

--check_determinism does the first step twice, compares all bits and writes nothing. --debug adds
the traceback to every mistake.

Exit codes: 0 the run is done, or was stopped and saved (results.json is there once it is done). 1
the machine lacks something, which one sentence says, or the program is at fault, which a traceback
shows. 2 the command, the data or the disk is wrong, which one sentence says. 3 training has
diverged: a loss, a gradient or a weight is no longer finite. 4 --check_determinism found a
difference. 130 the run was interrupted at once.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from moe_jax import distributed
from moe_jax.commands import Command, guarded, parse
from moe_jax.commands.command_line import CHECK

EXIT_DIFFERENT = 4  # --check_determinism found a difference


def main(argv: Sequence[str]) -> int:
  """Does what the command line says and returns the exit code."""

  def action(rest):
    return _train(parse([arg for arg in rest if arg != CHECK]), argv, check=CHECK in rest)

  return guarded(argv, __doc__, action)


def _train(command: Command, argv: Sequence[str], check: bool = False) -> int:
  """Checks the command, and trains.

  Cheap checks come first; Orbax and Grain, which take seconds, are imported once they have passed.
  """
  import jax

  from moe_jax import assembly
  from moe_jax.training import workdir

  config, directory = command.config, command.workdir
  assert directory is not None, "`parse` refuses a command without --workdir"
  distributed.initialize(command.distributed)
  assembly.validate(config, jax.device_count())
  workdir.check(directory, config)

  from absl import logging as absl_logging

  if not flags.FLAGS.is_parsed():
    # Grain's workers read flags of absl, which nobody has parsed.
    flags.FLAGS.mark_as_parsed()
  # Orbax warns about normal situations, and logs as errors what it also raises.
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("jax").setLevel(logging.WARNING)
  from moe_jax.data.cache import cache_dir
  from moe_jax.run import compiled, loop

  if warning := compiled.use_cache(cache_dir(config.data.cache_dir)):
    print(f"warning: {warning}", file=sys.stderr)
  with distributed.together():
    if check:
      return _check_determinism(loop.determinism(config))
    line = "python -m moe_jax.train " + shlex.join(argv[1:])
    loop.train(config, directory, {"config": command.path, "command": line})
  return 0


def _check_determinism(different: Sequence[str]) -> int:
  """Prints the result of --check_determinism and returns the exit code."""
  if not different:
    print("the first step was done twice and gave the same bits each time")
    return 0
  print(
    f"error: the first step was done twice, and {len(different)} arrays differ; the first is "
    f"{different[0]}; on a GPU, XLA_FLAGS=--xla_gpu_deterministic_ops=true makes every operation "
    "deterministic",
    file=sys.stderr,
  )
  return EXIT_DIFFERENT


if __name__ == "__main__":
  sys.exit(main(sys.argv))
