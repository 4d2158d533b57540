"""Reads a published config.json so that nothing in it that matters is overlooked.

A family's `keys` asks a `Settings` for each setting that it can express. Settings that change
nothing of what the model computes are known by name. Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.errors import ConfigError, shown
from moe_jax.options import Config

# Settings that do not change what a model computes: which software wrote them, how weights are
# initialised, what generation and training do. Dropout is a matter of training, too.
NEUTRAL = frozenset(
  """
  _name_or_path architectures auto_map add_cross_attention attention_dropout attn_pdrop
  bos_token_id chunk_size_feed_forward classifier_dropout decoder_start_token_id dropout_rate
  dtype emb_pdrop eos_token_id ep_size id2label initializer_factor initializer_range
  is_encoder_decoder label2id max_position_embeddings max_seq_len model_type n_positions
  output_attentions output_hidden_states output_past output_router_logits pad_token_id
  pretraining_tp problem_type quantization_config resid_pdrop return_dict router_aux_loss_coef
  router_jitter_noise
  seq_aux task_specific_params tokenizer_class torch_dtype transformers_version use_cache
  use_mla finetuning_task prefix torchscript pruned_heads attn_implementation
  """.split()
)
_NOTHING = (None, False, 0, 0.0, "", [], {})
_MISSING: Any = object()


class Settings:
  """The settings of a config.json, of which `done` refuses those that nobody asked for.

  Args:
    values: The settings.
    where: The name of the section, with a dot at its end, for messages.
  """

  def __init__(self, values: Mapping[str, Any], where: str = ""):
    self._values, self._where, self._asked = dict(values), where, set()
    self._problems: list[str] = []
    self._sections: list[Settings] = []

  def take(self, name: str, default: Any = _MISSING) -> Any:
    """Returns a setting, or the default if it is absent or null.

    A setting without a default that is absent is a problem, which `done` reports; then the result
    is 1, with which the rest can be read.
    """
    self._asked.add(name)
    value = self._values.get(name)
    if value is not None:
      return value
    if default is _MISSING:
      self._problems.append(f"{self._where}{name} is missing")
      return 1
    return default

  def must(self, name: str, *allowed: Any) -> Any:
    """Takes a setting that must be one of some values; absent or null, it is the first of them."""
    value = self.take(name, allowed[0])
    if value not in allowed:
      listed = " or ".join(repr(each) for each in allowed)
      self._problems.append(f"{self._where}{name}={shown(value)} must be {listed}")
      return allowed[0]
    return value

  def section(self, name: str) -> Settings:
    """Returns the settings inside a setting, whose problems are reported with those of this."""
    inside = self.take(name, {})
    if not isinstance(inside, Mapping):
      self.problem(f"{self._where}{name} must hold settings")
      inside = {}
    section = Settings(inside, f"{self._where}{name}.")
    self._sections.append(section)
    return section

  def ignore(self, *names: str) -> None:
    """Says that settings follow from others, or change nothing."""
    self._asked.update(names)

  def problem(self, sentence: str) -> None:
    """Adds a problem for `done` to report."""
    self._problems.append(sentence)

  def problems(self) -> list[str]:
    """Returns what is wrong, with settings that nobody asked for."""
    unknown = [
      f"{self._where}{name}={shown(value)} is not known here"
      for name, value in self._values.items()
      if name not in self._asked | NEUTRAL and value not in _NOTHING
    ]
    return [*self._problems, *unknown, *(p for each in self._sections for p in each.problems())]

  def done(self) -> None:
    """Raises ConfigError, which lists all problems, if there are any."""
    if problems := self.problems():
      raise ConfigError(
        "config.json",
        self._values.get("model_type", "?"),
        "cannot be expressed by moe_jax: " + "; ".join(problems),
      )


# Pairs of a setting and a key of the section `model` that have the same value.
LLAMA: dict[str, str] = {
  "hidden_size": "d_model",
  "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads",
  "vocab_size": "vocab_size",
}


def read_pairs(settings: Settings, pairs: Mapping[str, str]) -> dict[str, Any]:
  """Returns the dotted keys of such pairs."""
  return {f"model.{key}": settings.take(name) for name, key in pairs.items()}


def write_pairs(m: Config, pairs: Mapping[str, str]) -> dict[str, Any]:
  """Returns the settings of such pairs.

  Args:
    m: The section `model` of a config.
    pairs: Setting -> dotted key of the section.
  """
  written = {}
  for name, key in pairs.items():
    value = m
    for part in key.split("."):
      value = value[part]
    written[name] = value
  return written


def require(m: Config, model_type: str, **required: Any) -> None:
  """Raises ConfigError, which lists all of them, if keys do not have the values of a family.

  Args:
    m: The section `model` of a config.
    model_type: The name of the family in config.json.
    **required: Key -> value, or a tuple of values. `__` stands for a dot.
  """
  wrong = []
  for name, wanted in required.items():
    value = m
    for part in name.split("__"):
      value = value[part]
    if value != wanted and not (isinstance(wanted, tuple) and value in wanted):
      wrong.append(f"model.{name.replace('__', '.')}={shown(value)} must be {wanted!r}")
  if wrong:
    raise ConfigError("family", model_type, "cannot express this run: " + "; ".join(wrong))
