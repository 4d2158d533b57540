"""Digests are equal on every mesh and differ after any change, and non-finite arrays are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.training import digest

pytestmark = pytest.mark.unit


def test_a_digest_is_the_sums_of_bits_and_of_bits_times_places():
  # Catches an index that is not the row-major one, and a sum in 32 bits.
  values = np.array([[1, 2, 3], [4, 5, 6]], np.uint32)
  assert digest.examine({"x": values}).digests == {"x": f"{21:016x}{2 + 6 + 12 + 20 + 30:016x}"}
  large = np.full(2**10, 2**32 - 1, np.uint32)
  assert digest.examine(large).digests == {
    "": f"{(2**32 - 1) * 2**10:016x}{(2**32 - 1) * 2**9 * (2**10 - 1):016x}"
  }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "float16"])
def test_every_mesh_gives_the_same_digest(dtype):
  # Catches replicas that are counted twice, and shards whose indices all begin at 0.
  values = np.random.default_rng(0).integers(0, 2, (8, 4, 6)).astype(jnp.dtype(dtype))
  expected = digest.examine({"x": values}).digests
  for sizes, spec in (
    ({"data": 1}, ()),
    ({"expert": 8}, ("expert",)),
    ({"data": 2, "expert": 2, "tensor": 2}, ("expert", None, "tensor")),
    ({"data": 2, "fsdp": 4}, (None, "fsdp")),
  ):
    mesh = sharding.make_mesh(sizes)
    assert (
      digest.examine(
        {"x": jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))}
      ).digests
      == expected
    )


def test_any_flipped_bit_and_any_exchange_changes_it():
  # Catches a sum of floats, which rounds bits away, and a sum that does not depend on the order.
  values = np.random.default_rng(1).standard_normal((5, 7)).astype(np.float32)
  whole = digest.examine(values).digests
  for bit in range(0, values.nbytes * 8, 13):
    flipped = bytearray(values.tobytes())
    flipped[bit // 8] ^= 1 << bit % 8
    assert digest.examine(np.frombuffer(bytes(flipped), np.float32).reshape(5, 7)).digests != whole
  assert (
    digest.examine(values[::-1]).digests != whole
    and digest.examine(values[:, ::-1]).digests != whole
  )


def test_arrays_are_named_by_their_paths_and_those_not_finite_listed():
  # Catches integers and keys that are taken for floats, and an overlooked infinity at the end.
  tree = {
    "a": {"w": jnp.ones((3, 4)).at[2, 3].set(jnp.inf), "n": jnp.int32(7)},
    "k": jax.random.key(3),
    "b": [jnp.array([jnp.nan], jnp.bfloat16), jnp.zeros((0, 2))],
    "wide": np.array([1.5, np.inf]),
  }
  found = digest.examine(tree)
  assert list(found.digests) == ["a/n", "a/w", "b/0", "b/1", "k", "wide"]
  assert found.nonfinite == ["a/w", "b/0", "wide"]
  assert digest.examine(jax.random.key(3)).digests != digest.examine(jax.random.key(4)).digests
