"""Train a model: `python -m moe_jax.train --config=configs/quickstart.py --workdir=DIR
[--config.key=value] [--debug]`.

On a pod or a cluster each process runs this same command (`moe_jax/distributed.py`);
--distributed=HOST:PORT,N,INDEX where nothing in the environment says how they find each other.

`--config.model.moe=NAME` puts the routing of a paper into the config; `python -m moe_jax.routers`
lists the names. `--help=SECTION` prints the keys of a config's section (run, model, model.latent,
model.moe, model.moe.router, model.moe.dispatcher, data, optimizer, train, train.guard, mesh,
sharding, paper, report), and `--help=all` prints all of them.

The same command on the same workdir goes on where the run stopped. Ctrl-C or SIGTERM saves and
stops, as does --config.train.max_minutes=N, for queues that end a job by the clock.
--check_determinism does the first step twice, compares all bits and writes nothing.

Exit codes: 0 the run is done, or was stopped and saved (results.json is there once it is done); 1
the machine lacks something, told in one sentence, or the program is at fault, told with a
traceback; 2 the command, the data or the disk is wrong, told in one sentence; 3 training has
diverged: a loss, a gradient or a weight is no longer finite; 4 --check_determinism found a
difference; 130 interrupted at once.
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


def run() -> None:
  """The console entry point."""
  sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
  """Does what the command line says; returns the exit code."""

  def action(rest):
    return _train(parse([arg for arg in rest if arg != CHECK]), argv, check=CHECK in rest)

  return guarded(argv, __doc__, action)


def _train(command: Command, argv: Sequence[str], check: bool = False) -> int:
  """Cheap checks first; Orbax and Grain are imported only once they have passed."""
  import jax

  from moe_jax import assembly
  from moe_jax.training import workdir

  config = command.config
  distributed.initialize(command.distributed)
  assembly.validate(config, jax.device_count())
  workdir.check(command.workdir, config)

  from absl import logging as absl_logging

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags
  # Orbax warns of what is as it should be, and logs as errors what it also raises.
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("jax").setLevel(logging.WARNING)
  from moe_jax.run import loop

  with distributed.together():
    if check:
      return _check_determinism(loop.determinism(config))
    line = "python -m moe_jax.train " + shlex.join(argv[1:])
    loop.train(config, command.workdir, {"config": command.path, "command": line})
  return 0


def _check_determinism(different: Sequence[str]) -> int:
  """Prints what --check_determinism found; returns the exit code."""
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
  run()
