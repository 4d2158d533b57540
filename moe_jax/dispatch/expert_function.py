"""What a dispatcher needs to know about experts."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int


@runtime_checkable
class ExpertFunction(Protocol):
  """E experts, each a function of one row, offered in the forms that the dispatchers use. All forms
  agree in value."""

  @property
  def num_experts(self) -> int:
    """E."""
    ...

  @property
  def weights(self) -> Any:
    """A pytree whose leaves all have a leading axis E."""
    ...

  @property
  def axes(self) -> Any:
    """The same pytree with each leaf's logical axes (names of `sharding.RULES`) in its place; the
    first is "expert"."""
    ...

  def buffers(self, x: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
    """Applies expert e to the rows x[e]. A row of zeros may become anything finite: nobody reads an
    empty slot."""
    ...

  def hidden(self, w: Any, rows: Float[Array, "N D"]) -> Any:
    """The pre-activations (a pytree of [N, F]) of one expert, whose slice of `weights` is w."""
    ...

  def output(self, w: Any, pre: Any) -> Float[Array, "N D"]:
    """What that expert makes of its pre-activations: `output(w, hidden(w, rows))` is the expert."""
    ...

  def ragged(self, rows: Float[Array, "N D"], group_sizes: Int[Array, "E"]) -> Float[Array, "N D"]:
    """Applies expert 0 to the first group_sizes[0] rows, expert 1 to the next, ..., by
    `jax.lax.ragged_dot`."""
    ...
