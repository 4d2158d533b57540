"""Benchmarks of one MoE layer; README.md has the question and the outcome."""

from experiments.common.study import Study, lazy_verb

STUDY = Study(
  name="bench",
  about="How long does one MoE layer take beside a dense FFN, and what does routing cost?",
  verbs={
    "interop": lazy_verb(
      "Measures the memory of importing and exporting a published checkpoint.",
      "experiments.bench.interop",
    ),
    "dispatchers": lazy_verb(
      "Times each dispatcher beside a dense FFN of the same activated FLOPs.",
      "experiments.bench.dispatchers",
    ),
    "compiled": lazy_verb(
      "Counts the FLOPs and the memory of a dropless layer for accelerators that are not there.",
      "experiments.bench.compiled",
    ),
    "routing": lazy_verb(
      "Times what each router costs beside the experts' matmuls.", "experiments.bench.routing"
    ),
    "train": lazy_verb(
      "Times a training step beside transformers with the same weights and batch.",
      "experiments.bench.training_step",
    ),
    "generation": lazy_verb(
      "Times greedy decoding beside transformers' `generate` with the same weights.",
      "experiments.bench.generation",
    ),
  },
)
