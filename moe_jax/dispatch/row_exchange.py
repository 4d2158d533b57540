"""Exchange of rows between the devices of the mesh axis "expert".

A table states the number of rows that each device sends to each other device.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AXIS = "expert"


def has_ragged_all_to_all(platform: str, device_kind: str, devices: int) -> bool:
  """Returns whether XLA supports `jax.lax.ragged_all_to_all` on these devices.

  CPUs do not implement it. TPU v5e (whose device_kind is "TPU v5 lite") supports it on up to 16
  chips; on more chips the compiler rejects it after a full compilation, because routing between the
  chips is limited. Other TPUs and GPUs support it. These facts were found by compiling for each
  kind with jax 0.10.2.

  Args:
    platform: The platform, "cpu", "gpu" or "tpu", as in `jax.Device.platform`.
    device_kind: The kind of the devices, as in `jax.Device.device_kind`. It must be that of the
      devices of the mesh, which may differ from those of the host.
    devices: The number of devices of the whole mesh.
  """
  v5e = "v5 lite" in device_kind.lower() or "v5e" in device_kind.lower()
  return platform != "cpu" and not (v5e and devices > 16)


def exchange_rows(
  rows: Float[Array, "N D"], sizes: Int[Array, "P P"], num_out: int, most: int, ragged: bool
) -> Float[Array, "M D"]:
  """Sends sizes[s, d] rows from each device s to each device d, within `jax.shard_map`.

  The rows of a device are ordered by destination, and the rows that it receives are ordered by
  source, both without gaps. Input rows after the last of these are not sent, and output rows after
  the last are 0. The function is linear in `rows`. Its derivative is the exchange with the
  transposed table, so that nothing is sorted or scattered.

  Args:
    rows: The rows of this device.
    sizes: The whole table, which is the same on each of the P devices of the axis.
    num_out: The size of the buffer for received rows, M. It must be at least the sum of each column
      of `sizes`.
    most: The size to which each bucket is padded if `ragged` is False. It must be at least the
      largest entry of `sizes`.
    ragged: Whether to use `jax.lax.ragged_all_to_all`, see `has_ragged_all_to_all`. Otherwise rows
      travel in padded buckets.

  Returns:
    The received rows.
  """
  return _exchange(rows, sizes, rows.shape[0], num_out, most, ragged)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _exchange(rows, sizes, num_rows, num_out, most, ragged):
  return _by_ragged(rows, sizes, num_out) if ragged else _by_buckets(rows, sizes, num_out, most)


def _exchange_fwd(rows, sizes, *static):
  return _exchange(rows, sizes, *static), sizes


def _exchange_bwd(num_rows, num_out, most, ragged, sizes, d_out):
  return _exchange(d_out, sizes.T, num_out, num_rows, most, ragged), None


_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _by_ragged(rows, sizes, num_out):
  """Exchanges rows by `jax.lax.ragged_all_to_all`."""
  me, out = jax.lax.axis_index(AXIS), jnp.zeros_like(rows, shape=(num_out, rows.shape[1]))
  # The offsets at the destinations, after the rows that devices of lower index send there.
  output_offsets = starts(sizes, 0)[me]
  return jax.lax.ragged_all_to_all(
    rows, out, starts(sizes[me]), sizes[me], output_offsets, sizes[:, me], axis_name=AXIS
  )


def _by_buckets(rows, sizes, num_out, most):
  """Exchanges rows by an all-to-all of buckets that are padded to `most` rows."""
  me, slot = jax.lax.axis_index(AXIS), jnp.arange(most, dtype=jnp.int32)
  # One bucket per destination, [P, most, D]. The padding of a bucket consists of rows for other
  # destinations, which the receiver ignores.
  buckets = rows.at[starts(sizes[me])[:, None] + slot].get(mode="clip")
  arrived = jax.lax.all_to_all(buckets, AXIS, 0, 0, tiled=True).reshape(-1, rows.shape[1])
  source, place = piece(sizes[:, me], num_out)
  # Rows after the last piece get an index out of bounds and are filled with 0.
  return arrived.at[
    jnp.where(source < sizes.shape[0], source * most + place, arrived.shape[0])
  ].get(mode="fill", fill_value=0)


def starts(sizes: Int[Array, "*N"], axis: int = -1) -> Int[Array, "*N"]:
  """Returns the start of each piece if pieces of these sizes are concatenated along `axis`."""
  return jnp.cumsum(sizes, axis=axis, dtype=sizes.dtype) - sizes


def piece(sizes: Int[Array, "P"], num_rows: int) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
  """Returns (piece, place): the piece that each row belongs to and its index within the piece.

  Args:
    sizes: The sizes of P consecutive pieces.
    num_rows: The number of rows. Rows after the last piece get the piece P and an arbitrary place.
  """
  row = jnp.arange(num_rows, dtype=jnp.int32)
  number = jnp.searchsorted(jnp.cumsum(sizes), row, side="right").astype(jnp.int32)
  return number, row - starts(sizes).at[number].get(mode="clip")
