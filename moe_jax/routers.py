"""Lists the routers and presets: `python -m moe_jax.routers [--write FILE]`.

The command prints two Markdown tables: the routers in `ROUTERS`, and the presets that
`--config.model.moe=NAME` accepts. Papers and equations come from the docstrings of the routers,
options from their signatures, and values of losses from running them. `--write docs/routers.md`
writes the tables between the markers in that file.
"""

from __future__ import annotations

import functools
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.assembly.presets import PRESETS
from moe_jax.assembly.sections import NEUTRAL
from moe_jax.commands import Flag, guarded, take_flags
from moe_jax.commands.flags import positional
from moe_jax.errors import ConfigError
from moe_jax.layers import LOSSES, LossOptions, RouterFacts, load_without_noise
from moe_jax.layers.moe_losses import auxiliary_losses
from moe_jax.routing import ROUTERS, RoutingContext

# The sizes of the examples on which losses are evaluated.
EXPERTS, TOKENS, DEVICES = 16, 64, 4
# The losses whose values are shown. They are 0 or 1 at perfect balance.
BALANCING = ("balance", "device", "communication", "importance", "load")
# The words of the column "causal-safe" for each `Leak`.
CAUSAL = {"no": "yes", "overflow": "yes, but for second choices where slots run out", "yes": "no"}


def main(argv: Sequence[str]) -> int:
  """Prints or writes the tables and returns the exit code.

  Args:
    argv: The command line, beginning with the program's name.
  """
  return guarded(argv, __doc__, lambda rest: _main(rest[1:]))


def _main(argv: Sequence[str]) -> int:
  flags, rest = take_flags(argv, (Flag("write"),), config=False)
  positional(rest, [])
  tables = {"routers": router_table(), "presets": preset_table()}
  if "write" not in flags:
    print("\n\n".join(tables.values()))
    return 0
  file = pathlib.Path(flags["write"])
  try:
    text = file.read_text()
  except (OSError, ValueError) as error:
    raise ConfigError(
      "write", flags["write"], f"{error}; give a text file with the markers of docs/routers.md"
    ) from error
  for name, table in tables.items():
    text = replace(text, name, table)
  file.write_text(text)
  return 0


def router_table() -> str:
  """Returns the Markdown table of the routers, with one row per router."""
  rows = [
    (
      f"`{name}`",
      paper(router.route),
      f"`{equation(router.route)}`",
      balance_values(name),
      CAUSAL[router.leak()],
      ", ".join(f"`{option}={value!r}`" for option, value in router.options.items()) or "none",
    )
    for name, router in ROUTERS.items()
  ]
  head = (
    "router",
    "paper",
    "equation",
    f"losses at balance → collapse (E={EXPERTS})",
    "causal-safe",
    "options with defaults",
  )
  return _markdown(head, rows)


def preset_table() -> str:
  """Returns the Markdown table of the presets, with one row per preset.

  A row lists the options that the preset gives its router, and the keys of `model.moe` whose values
  differ from `NEUTRAL`.
  """

  def show(values):
    return ", ".join(
      f"`{key}={value:g}`" if isinstance(value, float) else f"`{key}={value!r}`"
      for key, value in values.items()
    )

  rows = []
  for name, (router, options, keys) in PRESETS.items():
    changes = {key: value for key, value in keys.items() if value != NEUTRAL.get(key)}
    soft = "soft_slots" in keys
    leak = "yes" if soft else ROUTERS[router].leak(**options)
    # A dropless layer has no slots that could run out.
    if leak == "overflow" and not keys.get("capacity_factor") and "capacity_factor" not in options:
      leak = "no"
    rows.append(
      (
        f"`{name}`",
        "Soft MoE layer" if soft else f"`{router}`",
        "" if soft else show(options),
        show(changes),
        CAUSAL[leak],
      )
    )
  return _markdown(("preset", "router", "its options", "keys of `model.moe`", "causal-safe"), rows)


def paper(router: Callable) -> str:
  """Returns the paragraph of a router's docstring that begins with "Paper: ", without this prefix.

  Raises:
    ValueError: If the docstring does not have exactly one such paragraph.
  """
  papers = [" ".join(block.split()) for block in _paragraphs(router) if block.startswith("Paper: ")]
  if len(papers) != 1:
    raise ValueError(
      f"the docstring of {router.__name__} needs one paragraph that begins with 'Paper: '"
    )
  return papers[0].removeprefix("Paper: ").rstrip(".")


def equation(router: Callable) -> str:
  """Returns the first indented paragraph of a router's docstring on one line.

  Raises:
    ValueError: If the docstring has no indented paragraph.
  """
  indented = [block for block in _paragraphs(router) if block.startswith("    ")]
  if not indented:
    raise ValueError(
      f"the docstring of {router.__name__} needs its equation as an indented paragraph"
    )
  # A line that is indented more than the first one continues the line before it.
  margin, lines = len(indented[0]) - len(indented[0].lstrip()), []
  for line in indented[0].splitlines():
    words = " ".join(line.split())
    if lines and len(line) - len(line.lstrip()) > margin:
      lines[-1] += f" {words}"
    else:
      lines.append(words)
  return "; ".join(line.rstrip(",;") for line in lines)


def balance_values(name: str) -> str:
  """Returns the values of a router's balancing losses at perfect balance and at collapse, as text.

  The losses are those that presets use with this router. Their values come from running it.

  Returns:
    Text such as "importance 0 → 15, load 0 → 3", or "none" if no preset uses such a loss.
  """
  used = {
    key.removesuffix("_loss")
    for router, _, keys in PRESETS.values()
    if router == name
    for key in keys
  }
  names = tuple(each for each in BALANCING if each in used)
  if not names:
    return "none"
  # Without jit, every operation would be compiled by itself.
  losses = jax.jit(functools.partial(_losses, name, names))
  balanced, collapsed = (losses(*example(name, collapsed=c)) for c in (False, True))
  return ", ".join(
    f"{each} {_short(float(balanced[each]))} → {_short(float(collapsed[each]))}" for each in names
  )


def _losses(
  name: str, names: tuple[str, ...], logits: Float[Array, "S E"], context: RoutingContext
) -> dict[str, Float[Array, ""]]:
  """Returns the losses of a router on one group of tokens.

  Args:
    name: The name of the router.
    names: The losses that are evaluated, of which the first determines the preset whose settings
      of the losses are used.
    logits: The router outputs.
    context: The other inputs of the router.
  """
  router = ROUTERS[name]
  options, plan = router.options, router.route(logits, context)
  k = max(plan.expert.shape[-1] // TOKENS, 1)
  load = (
    functools.partial(router.smooth_load, **options)
    if router.smooth_load
    else functools.partial(load_without_noise, k=k)
  )
  devices = options["groups"] if "kept_groups" in options and options["groups"] > 1 else DEVICES
  keys = next(
    keys for preset, _, keys in PRESETS.values() if preset == name and f"{names[0]}_loss" in keys
  )
  weights: dict[str, Any] = {f"{loss}_loss": float(loss in names) for loss in LOSSES}
  loss = LossOptions(
    **weights,
    balance_counts="all",
    balance_scores=keys.get("balance_scores", "softmax"),
    importance_of=keys.get("importance_of", "probs"),
    devices=devices,
  )
  facts = RouterFacts(k=k, devices_a_token=min(options.get("kept_groups", k), devices), load=load)

  # The losses expect an axis of groups.
  def batch(tree):
    return jax.tree.map(lambda leaf: leaf[None], tree)

  context = batch(context).replace(valid=jnp.ones((1, TOKENS), bool))
  return auxiliary_losses(loss, facts, batch(logits), batch(plan), context)


def example(name: str, collapsed: bool) -> tuple[Float[Array, "S E"], RoutingContext]:
  """Returns inputs for which a router is perfectly balanced, or collapsed.

  Args:
    name: The name of the router.
    collapsed: Whether the router should send every token to the same experts.

  Returns:
    (logits, context) of one group of tokens.
  """
  token, learned = jnp.arange(TOKENS)[:, None], ROUTERS[name].learned
  groups = ROUTERS[name].options["groups"] if "primary" in learned else 1
  in_group = EXPERTS // groups
  # At balance, each token prefers the expert after that of the previous token.
  shift = 0 if collapsed else 1
  scale = 200.0 if collapsed else 4.0

  def prefer(first, size):
    return -scale * ((jnp.arange(size) - shift * first) % size)

  fields = {
    "primary": prefer(token // in_group, groups),
    "noise_std": jnp.full((TOKENS, EXPERTS), 0.1),
    "primary_noise_std": jnp.full((TOKENS, groups), 0.1),
    "threshold": jnp.zeros(EXPERTS),
  }
  logits = jnp.tile(prefer(token, in_group), (1, groups))
  return logits, RoutingContext(
    token_ids=token[:, 0], train=True, **{key: fields[key] for key in learned}
  )


def replace(text: str, name: str, table: str) -> str:
  """Returns `text` with `table` in place of what is between the markers of this name.

  Raises:
    ConfigError: If there are no such markers.
  """
  start, end = f"<!-- table:{name} -->\n", f"\n<!-- /table:{name} -->"
  pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
  if not pattern.search(text):
    raise ConfigError(
      "write", name, f"the file has no lines {start.strip()} and {end.strip()} to write between"
    )
  return pattern.sub(lambda _: start + table + end, text)


def _short(value: float) -> str:
  return f"{round(value, 3):g}"


def _paragraphs(router: Callable) -> list[str]:
  return [block.strip("\n") for block in (inspect.getdoc(router) or "").split("\n\n")]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  def line(cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

  return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


if __name__ == "__main__":
  sys.exit(main(sys.argv))
