"""The interface between dispatchers and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# The names of what a layer with experts may keep for its backward pass (`models.stack.REMAT`): the
# rows that experts receive, their pre-activations, and the rows that come back to the tokens.
RECEIVED, HIDDEN, RETURNED = "moe_received", "moe_hidden", "moe_returned"


def named(tree: Any, name: str) -> Any:
  """Returns the arrays of `tree` under a name that rematerialisation policies know."""
  return jax.tree.map(lambda array: checkpoint_name(array, name), tree)


@runtime_checkable
class ExpertFunction(Protocol):
  """E experts, each of which is a function of one row.

  The methods apply the experts in the different forms that dispatchers need. All forms have the
  same values.
  """

  @property
  def num_experts(self) -> int:
    """The number of experts, E."""
    ...

  @property
  def weights(self) -> Any:
    """A pytree whose leaves all have a leading axis E."""
    ...

  @property
  def axes(self) -> Any:
    """This pytree with the logical axes of each leaf in its place.

    Logical axes are names of `sharding.RULES`. The first one is "expert". If a mesh splits some
    leaves over "tensor", each of its devices computes a partial sum of the outputs. A leaf that it
    does not split must then be a term of the outputs, such as a bias, because all but one of these
    devices replace it by zeros.
    """
    ...

  def buffers(self, x: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
    """Applies expert e to the rows x[e].

    The result for a row of zeros may be anything finite, because nobody reads an empty slot.
    """
    ...

  def hidden(self, w: Any, rows: Float[Array, "N D"]) -> Any:
    """Returns the pre-activations of one expert, a pytree of [N, F] arrays.

    Args:
      w: The slice of `weights` of the expert.
      rows: The inputs of the expert.
    """
    ...

  def output(self, w: Any, pre: Any) -> Float[Array, "N D"]:
    """Returns the output of one expert, given its pre-activations.

    `output(w, hidden(w, rows))` is the whole expert.

    Args:
      w: The slice of `weights` of the expert.
      pre: The pre-activations that `hidden` returned.
    """
    ...

  def ragged(
    self,
    rows: Float[Array, "N D"],
    group_sizes: Int[Array, "E"],
    matmul: Callable[[Array, Array, Array], Array] = jax.lax.ragged_dot,
  ) -> Float[Array, "N D"]:
    """Applies the experts to rows that are sorted by expert, with a grouped product.

    Expert 0 gets the first group_sizes[0] rows, expert 1 the next group_sizes[1] rows and so on.

    Args:
      rows: The rows.
      group_sizes: The number of rows of each expert.
      matmul: The product (rows, matrices [E, ...], group_sizes) -> rows.
    """
    ...
