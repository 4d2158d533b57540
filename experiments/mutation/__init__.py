"""Small changes of the package's source, which its tests should notice."""

from experiments.common.study import Study, lazy_verb

STUDY = Study(
  name="mutation",
  about="Do the tests notice when the code that they cover is changed?",
  verbs={
    "run": lazy_verb(
      "Changes the code in many places, one at a time, and runs the tests of each.",
      "experiments.mutation.sample",
    )
  },
)
