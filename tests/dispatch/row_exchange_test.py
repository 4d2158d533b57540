"""Tests both implementations of the exchange of rows against loops, and the choice between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from moe_jax.dispatch.row_exchange import exchange_rows, has_ragged_all_to_all, piece
from moe_jax.sharding import make_mesh

pytestmark = pytest.mark.unit

WAYS, N, M = 4, 7, 14
# The number of rows by source and destination.
SIZES = np.array([[1, 0, 2, 3], [0, 0, 0, 0], [3, 1, 3, 0], [0, 3, 2, 1]], np.int32)


def as_documented(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
  """Implements the documentation of `jax.lax.ragged_all_to_all` with all-gathers.

  The operation itself does not run on CPUs.
  """
  me, place = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
  every = functools.partial(jax.lax.all_gather, axis_name=axis_name)
  rows, begin, size, there = map(every, (operand, input_offsets, send_sizes, output_offsets))
  for source in range(WAYS):
    offset = place - there[source, me]
    written = (offset >= 0) & (offset < size[source, me])
    output = jnp.where(
      written[:, None], rows[source].at[begin[source, me] + offset].get(mode="clip"), output
    )
  return output


def by_loops(rows, sizes, num_out):
  """Returns the rows [P, num_out, D] that each device receives, given those of each, [P, N, D]."""
  out = np.zeros((WAYS, num_out, rows.shape[-1]), rows.dtype)
  for to in range(WAYS):
    pieces = [rows[s, sizes[s, :to].sum() : sizes[s, : to + 1].sum()] for s in range(WAYS)]
    received = np.concatenate(pieces)
    out[to, : len(received)] = received
  return out


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_arrive_by_source_and_gradients_return(ragged, monkeypatch):
  # Catches offsets of the sender instead of those of the receiver, a transposed table, rows after
  # the last that are sent, and a derivative that is not the exchange in the opposite direction.
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", as_documented)
  rng = np.random.default_rng(0)
  rows, d_out = (rng.normal(size=(WAYS, n, 2)).astype(np.float32) for n in (N, M))

  def local(rows, d_out):
    out, pull = jax.vjp(lambda rows: exchange_rows(rows, jnp.asarray(SIZES), M, 3, ragged), rows[0])
    return out[None], pull(d_out[0])[0][None]

  with jax.set_mesh(make_mesh({"expert": WAYS})):
    both = jax.shard_map(
      local, in_specs=(P("expert"), P("expert")), out_specs=P("expert"), check_vma=True
    )
    out, d_rows = tiny.quick_jit(both)(rows, d_out)
  np.testing.assert_array_equal(out, by_loops(rows, SIZES, M))
  np.testing.assert_array_equal(d_rows, by_loops(d_out, SIZES.T, N))


@pytest.mark.parametrize(
  "platform, kind, devices, expected",
  [
    ("cpu", "cpu", 8, False),
    ("gpu", "NVIDIA H100 80GB HBM3", 64, True),
    ("tpu", "TPU v4", 1024, True),
    ("tpu", "TPU v5 lite", 16, True),
    ("tpu", "TPU v5 lite", 32, False),
    ("tpu", "TPU v5e", 256, False),
    ("tpu", "TPU v5", 4096, True),
    ("tpu", "TPU v5p", 4096, True),
    ("tpu", "TPU v6 lite", 256, True),
    ("tpu", "TPU7x", 2048, True),
  ],
)
def test_where_there_is_a_ragged_one(platform, kind, devices, expected):
  # Catches v5e mistaken for v5p, or for v6e, which is also called "lite", and a number of chips
  # that is ignored.
  assert has_ragged_all_to_all(platform, kind, devices) == expected


def test_pieces():
  # Catches an empty piece that gets a row, and places that are not counted from 0 in each piece.
  number, place = piece(jnp.array([2, 0, 1]), 5)
  np.testing.assert_array_equal(number, [0, 0, 2, 3, 3])
  np.testing.assert_array_equal(place[:3], [0, 1, 0])
