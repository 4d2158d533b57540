"""What a routing algorithm is to the rest of the package: one value, declared at the end of the
router's file."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Array

from moe_jax.options import arguments
from moe_jax.routing.plan import RoutingPlan

# Whether later tokens change what earlier ones get, in training:
#   "no"        They never do.
# "overflow"  They do only where slots run out, and never for a token's first choice: a later
# token's first choice
# displaces an earlier token's second one (GShard, GLaM). Without a capacity nothing leaks.
#   "yes"       They change first choices, too. A causal model refuses such a router.
Leak = Literal["no", "overflow", "yes"]


@dataclasses.dataclass(frozen=True)
class Router:
  """A routing algorithm, and what the layer, balancing and the check of causality must know about
  it.

  Attributes:
    route: `f(logits [S, E], context, *, options) -> RoutingPlan`, a pure function of one group. Its
      keyword-only arguments are the router's options.
    looks_ahead: a `Leak`, or a function that returns one for the options that its parameters name.
    learned: the fields of `RoutingContext` that the layer learns for this router.
    smooth_load: `f(logits, context, **options)`, CV^2 of the smooth load under the router's own
      noise (Shazeer et al. 2017, appendix A). None: the router has no noise of its own.
    reads_bias: whether the router reads `context.bias`, so that loss-free balancing can move it.
  """

  route: Callable[..., RoutingPlan]
  looks_ahead: Leak | Callable[..., Leak]
  learned: tuple[str, ...] = ()
  smooth_load: Callable[..., Array] | None = None
  reads_bias: bool = False

  @functools.cached_property
  def options(self) -> Mapping[str, Any]:
    """The default of each option."""
    return {name: key.default for name, key in arguments(self.route).items()}

  def leak(self, **options: Any) -> Leak:
    """Returns whether the router looks ahead with these options; those not given have their
    defaults."""
    if not callable(self.looks_ahead):
      return self.looks_ahead
    given = {**self.options, **options}
    return self.looks_ahead(
      **{name: given[name] for name in inspect.signature(self.looks_ahead).parameters}
    )
