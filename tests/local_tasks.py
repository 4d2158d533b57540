"""Task files of lm-evaluation-harness that need no download: choices, a text and an answer."""

import json
import pathlib

QUESTIONS = [
  {"question": "the expert", "choices": [" routes", " sees", " learns"], "label": 0},
  {"question": "a token", "choices": [" sees", " routes"], "label": 1},
  {"question": "each", "choices": [" learns", " of"], "label": 0},
]
_TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
"""
_CHOICES = """doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
fewshot_split: test
fewshot_delimiter: "; "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_TEXT = """doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
"""
_ANSWER = """doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: [" ", "e"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes the tasks `choices`, `text` and `answer` into a folder, and returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / "questions.jsonl"
  file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
  kinds = {
    "choices": ("multiple_choice", _CHOICES),
    "text": ("loglikelihood_rolling", _TEXT),
    "answer": ("generate_until", _ANSWER),
  }
  for name, (kind, rest) in kinds.items():
    head = _TASK.format(name=name, file=file, kind=kind)
    (folder / f"{name}.yaml").write_text(head + rest)
  return folder
