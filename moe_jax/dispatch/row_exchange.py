"""Rows between the devices of the mesh axis "expert", as many from each to each as a table says."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AXIS = "expert"


def has_ragged_all_to_all(platform: str, device_kind: str, devices: int) -> bool:
  """Whether XLA runs `jax.lax.ragged_all_to_all` there; if not, rows travel in padded buckets.

  CPU: not implemented. TPU v5e (its device_kind is "TPU v5 lite"): up to 16 chips; above, the
  compiler refuses it after a full compilation, because routing between its chips is limited. Other
  TPUs and GPUs: yes. Found by compiling for each kind with jax 0.10.2.

  Args:
    platform: "cpu", "gpu", "tpu", as `jax.Device.platform` says.
    device_kind: as `jax.Device.device_kind` says; of the mesh's devices, never of the host's.
    devices: of the whole mesh.
  """
  v5e = "v5 lite" in device_kind.lower() or "v5e" in device_kind.lower()
  return platform != "cpu" and not (v5e and devices > 16)


def exchange_rows(
  rows: Float[Array, "N D"], sizes: Int[Array, "P P"], num_out: int, most: int, ragged: bool
) -> Float[Array, "M D"]:
  """Within `jax.shard_map`: device s sends sizes[s, d] of its rows to device d.

  A device's rows lie in the order of their destinations, those it receives in the order of their
  sources, without gaps both; what lies behind them is not sent, and is 0. Linear in `rows`; the
  derivative is the exchange by the transposed table, so that nothing is sorted or scattered.

  Args:
    rows: of this device.
    sizes: the whole table, the same on each of the P devices of the axis.
    num_out: M, room for received rows: at least the sum of each column.
    most: at least the largest entry of `sizes`; what each bucket is padded to where `ragged` is
      False.
    ragged: by `jax.lax.ragged_all_to_all`, see `has_ragged_all_to_all`.
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
  me, out = jax.lax.axis_index(AXIS), jnp.zeros_like(rows, shape=(num_out, rows.shape[1]))
  there = starts(sizes, 0)[me]  # at each destination, behind what lower devices send
  return jax.lax.ragged_all_to_all(
    rows, out, starts(sizes[me]), sizes[me], there, sizes[:, me], axis_name=AXIS
  )


def _by_buckets(rows, sizes, num_out, most):
  me, slot = jax.lax.axis_index(AXIS), jnp.arange(most, dtype=jnp.int32)
  buckets = rows.at[starts(sizes[me])[:, None] + slot].get(
    mode="clip"
  )  # [P, most, D]; short ones hold others' rows
  arrived = jax.lax.all_to_all(buckets, AXIS, 0, 0, tiled=True).reshape(-1, rows.shape[1])
  source, place = piece(sizes[:, me], num_out)
  return arrived.at[
    jnp.where(source < sizes.shape[0], source * most + place, arrived.shape[0])
  ].get(mode="fill", fill_value=0)


def starts(sizes: Int[Array, "*N"], axis: int = -1) -> Int[Array, "*N"]:
  """Where each piece begins, if pieces of these sizes lie one behind the other along `axis`."""
  return jnp.cumsum(sizes, axis=axis, dtype=sizes.dtype) - sizes


def piece(sizes: Int[Array, "P"], num_rows: int) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
  """Of `num_rows` rows, cut into pieces of these sizes: each row's piece, P behind the last, and
  its place there."""
  row = jnp.arange(num_rows, dtype=jnp.int32)
  number = jnp.searchsorted(jnp.cumsum(sizes), row, side="right").astype(jnp.int32)
  return number, row - starts(sizes).at[number].get(mode="clip")
