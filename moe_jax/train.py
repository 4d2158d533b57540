"""Trains a model.

  python -m moe_jax.train --config=configs/quickstart.py --workdir=DIR [--config.KEY=VALUE ...]

The same command with the same workdir continues where the run stopped. Ctrl-C and SIGTERM save and
stop, and so does --config.train.max_minutes=N, for batch queues that end a job by the clock.

On a pod or a cluster each process runs this same command (`moe_jax/distributed.py`), with
--distributed=HOST:PORT,N,INDEX where nothing in the environment says how they find each other.

`--config.model.moe=NAME` puts the routing of a paper into the config; `python -m moe_jax.routers`
lists the names. `--help=SECTION` prints the keys of a section of the config (run, model,
model.latent, model.rope, model.moe, model.moe.router, model.moe.dispatcher, data, optimizer, train,
train.guard, train.teacher, mesh, sharding, paper, report), and `--help=all` prints all of them.

Compiled programs are kept in the cache folder, ~/.cache/moe_jax or data.cache_dir, so that a second
start is faster; JAX_ENABLE_COMPILATION_CACHE=false switches that off.

--router=FILE.py:NAME trains with a router of your own file; NAME is its function, or a `Router`.

--tracker=wandb also sends the metrics to Weights & Biases (pip install wandb). --profile, or
--profile=N, writes what the devices do in five or N steps to WORKDIR/profile: the file
perfetto_trace.json.gz can be opened at ui.perfetto.dev, and TensorBoard's profile plug-in reads the
folder.

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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags

from moe_jax import distributed
from moe_jax.commands import Command, guarded, parse
from moe_jax.commands.allocator import keep_memory
from moe_jax.commands.flags import Flag, switch, take_flags
from moe_jax.errors import choose, whole

if TYPE_CHECKING:
  from moe_jax.run.watch import Watch

EXIT_DIFFERENT = 4  # --check_determinism found a difference
FLAGS = (Flag("check_determinism", bare=""), Flag("tracker"), Flag("profile", bare="5"))


def main(argv: Sequence[str]) -> int:
  """Does what the command line says and returns the exit code."""

  def action(rest):
    values, others = take_flags(rest[1:], FLAGS, passes=True)
    return _train(parse([rest[0], *others], others=FLAGS), argv, values)

  keep_memory()
  return guarded(argv, __doc__, action)


def _train(command: Command, argv: Sequence[str], values: Mapping[str, str]) -> int:
  """Checks the command, and trains; `values` are those of `FLAGS`.

  Cheap checks come first; Orbax and Grain, which take seconds, are imported once they have passed.
  """
  import jax

  from moe_jax import assembly
  from moe_jax.training import workdir

  check = switch("check_determinism", values.get("check_determinism"))
  watch = _watch(values)
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
    loop.train(config, directory, {"config": command.path, "command": line}, watch)
  return 0


def _watch(values: Mapping[str, str]) -> Watch:
  """Returns what --tracker and --profile ask for."""
  from moe_jax.run.watch import Watch
  from moe_jax.training.boards import TRACKERS

  return Watch(
    choose("tracker", values["tracker"], TRACKERS) if "tracker" in values else "",
    # The files of more steps than these would be too large for any viewer.
    whole("profile", values["profile"], high=1000) if "profile" in values else 0,
  )


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
