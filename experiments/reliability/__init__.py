"""Random bad input, kills and faults, each of which a run must survive or name in one sentence."""

from experiments.common.study import Study, lazy_verb

STUDY = Study(
  name="reliability",
  about="What do kills, faults, bad input and long runs do to a training run?",
  verbs={
    "fuzz": lazy_verb(
      "Mutates configs, command lines and files of a run.", "experiments.reliability.fuzz"
    ),
    "soak": lazy_verb(
      "Kills runs again and again, and compares them with one that was never killed.",
      "experiments.reliability.soak",
    ),
    "faults": lazy_verb(
      "Injects faults of disks, files, numbers and commands into a small run.",
      "experiments.reliability.faults",
    ),
    "memory": lazy_verb(
      "Trains many steps, whose memory must not grow.", "experiments.reliability.memory"
    ),
  },
)
