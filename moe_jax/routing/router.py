"""The description of a routing algorithm for the rest of the package.

Each file with a routing algorithm declares one `Router` at its end.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Array

from moe_jax.options import arguments
from moe_jax.routing.plan import RoutingPlan

# Whether later tokens of a group change the routing of earlier tokens in training. In a causal
# model that leaks information about the future.
#   "no"        They never do.
#   "overflow"  They do only where slots run out, and never for a token's first choice: the first
#               choice of a later token displaces the second choice of an earlier one (GShard,
#               GLaM). Without a capacity nothing leaks.
#   "yes"       They change first choices, too. A causal model refuses such a router.
Leak = Literal["no", "overflow", "yes"]


@dataclasses.dataclass(frozen=True)
class Router:
  """A routing algorithm with the facts that the layer, load balancing and causality checks need.

  Attributes:
    route: `f(logits [S, E], context, *, options) -> RoutingPlan`, a pure function of one group. Its
      keyword-only parameters are the options of the router.
    looks_ahead: A `Leak`, or a function that returns one. The parameters of the function are the
      options on which the answer depends.
    learned: The fields of `RoutingContext` that the layer learns for this router.
    smooth_load: `f(logits, context, **options)`, which returns CV^2 of the smooth load under the
      router's own noise (Shazeer et al. 2017, appendix A). None means that the router adds no
      noise of its own.
    biased: `f(logits [*, E], **options) -> scores [*, E]`, the scores to which the router adds
      `context.bias`, which loss-free balancing moves (`balancing.py`). None means that the router
      reads no bias.
    average: The option that holds the mean number of experts per token, of a router whose plans
      have room for more. "" means that a plan is as long as the assignments that it makes.
    rules: The rules of balancing that are made for this router (`balancing.py`), and the only ones
      that may move its `context.bias`. Without any, general rules may, if the router is `biased`.
    competes: Whether tokens compete for experts in evaluation, too, and without a capacity. Such a
      router cannot route a token by itself, so that its models do not generate text.
  """

  route: Callable[..., RoutingPlan]
  looks_ahead: Leak | Callable[..., Leak]
  learned: tuple[str, ...] = ()
  smooth_load: Callable[..., Array] | None = None
  biased: Callable[..., Array] | None = None
  average: str = ""
  rules: tuple[str, ...] = ()
  competes: bool = False

  @functools.cached_property
  def options(self) -> Mapping[str, Any]:
    """Maps the name of each option of the router to its default."""
    return {name: key.default for name, key in arguments(self.route).items()}

  def leak(self, **options: Any) -> Leak:
    """Returns whether the router looks ahead with `options`, completed by the defaults."""
    if not callable(self.looks_ahead):
      return self.looks_ahead
    all_options = {**self.options, **options}
    return self.looks_ahead(
      **{name: all_options[name] for name in inspect.signature(self.looks_ahead).parameters}
    )
