"""Splash attention, JAX's kernel for TPUs, which skips blocks of keys that no query sees.

It holds no scores outside of the chip's own memory, and masks documents, later keys and keys
outside of a window. It has neither biases nor sinks nor dropout.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moe_jax.sharding import spec

# Lanes of a TPU's vector unit. Blocks have multiples of them.
_LANES = 128
# Numbers of queries, and of keys, of a block, of which the first that divides the row is used.
# MaxText's default is 512.
_BLOCKS = (512, 256, _LANES)
# TPUs for which Pallas has no compiler.
_TOO_OLD = ("TPU v2", "TPU v3")


def obstacle(
  length: int, kv_heads: int, *, has_bias: bool, has_sinks: bool, has_dropout: bool
) -> str:
  """Returns why the kernel cannot compute self-attention on the current mesh of TPUs, or "".

  Args:
    length: Tokens of a row.
    kv_heads: Key-value heads, K.
    has_bias: Whether something is added to the scores.
    has_sinks: Whether heads have sinks.
    has_dropout: Whether weights have dropout.
  """
  mesh = jax.sharding.get_abstract_mesh()
  kind = mesh.abstract_device.device_kind if mesh.abstract_device else ""
  (heads,) = spec(("act_heads",), (kv_heads,), dict(mesh.shape))
  (whole,) = spec(("act_heads",), (0,), dict(mesh.shape))
  reasons = {
    f"it cannot be compiled for {kind}": kind in _TOO_OLD,
    "it has no biases": has_bias,
    "it has no sinks": has_sinks,
    "it has no dropout": has_dropout,
    f"{_LANES} does not divide {length:,}": length % _LANES > 0,
    f"devices cannot share {kv_heads} key-value heads": heads != whole,
  }
  return next((reason for reason, holds in reasons.items() if holds), "")


def attend_by_splash(
  q: Float[Array, "B L K G P"],
  k: Float[Array, "B L K P"],
  v: Float[Array, "B L K U"],
  segment_ids: Int[Array, "B L"],
  *,
  causal: bool = True,
  window: int = 0,
  interpret: bool = False,
) -> Float[Array, "B L K G U"]:
  """Returns what `attend` returns for self-attention.

  On a mesh, each device computes its own rows and heads, which `jax.shard_map` gives to it.

  Args:
    q: Queries, already scaled, of which G read each of the K key-value heads.
    k: Keys.
    v: Values. Their width U may differ from the width P of queries and keys.
    segment_ids: Document of each token.
    causal: Whether a query sees no later keys.
    window: The number of last keys that a query sees, its own included; 0 means no limit. It has no
      effect unless `causal`.
    interpret: Whether the kernel is emulated, on other platforms and slowly.
  """
  run = functools.partial(_of_one_device, causal=causal, window=window, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(q, k, v, segment_ids)
  rows, heads = spec(("batch", "act_heads"), (q.shape[0], k.shape[2]), dict(mesh.shape))
  own = PartitionSpec(rows, None, heads)
  # The kernel's results do not say over which mesh axes they vary, which check_vma would need.
  return jax.shard_map(
    run, in_specs=(own, own, own, PartitionSpec(rows)), out_specs=own, check_vma=False
  )(q, k, v, segment_ids)


def _of_one_device(q, k, v, segment_ids, *, causal, window, interpret):
  """Computes `attend_by_splash` for the rows and heads of one device."""
  # Imported here because other platforms should not need Pallas.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  length, heads = q.shape[1], q.shape[2] * q.shape[3]
  square = (length, length)
  if not causal:
    mask = masks.FullMask(square)
  elif window:
    mask = masks.LocalMask(square, window_size=(window - 1, 0), offset=0)
  else:
    mask = masks.CausalMask(square)
  size = next(size for size in _BLOCKS if length % size == 0)
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(
      block_q=size,
      block_kv=size,
      block_kv_compute=size,
      block_q_dkv=size,
      block_kv_dkv=size,
      block_kv_dkv_compute=size,
      block_q_dq=size,
      block_kv_dq=size,
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )

  def of_row(q, k, v, ids) -> Any:
    return kernel(q, k, v, segment_ids=splash.SegmentIds(q=ids, kv=ids))

  # The kernel's axes are [heads, tokens, features], and query head h reads key head h // G.
  queries = q.reshape(*q.shape[:2], heads, q.shape[-1])
  queries, k, v = (jnp.swapaxes(t, 1, 2) for t in (queries, k, v))
  # The program has the number of blocks, from which `hlo.matmuls` knows the kernel's work.
  with jax.named_scope(_blocks_scope(length // size, size, causal, window)):
    mixed = jax.vmap(of_row)(queries, k, v, segment_ids)
  return jnp.swapaxes(mixed, 1, 2).reshape(*q.shape[:-1], v.shape[-1])


def _blocks_scope(blocks: int, size: int, causal: bool, window: int) -> str:
  """Returns "splash_N_of_M_blocks": N blocks of scores are computed, of M of the whole square.

  Args:
    blocks: Number of blocks of queries of a row, and of keys.
    size: Queries, and keys, of a block.
    causal: See `attend_by_splash`.
    window: See `attend_by_splash`.
  """

  def keys(block):
    """Returns how many blocks of keys a block of queries reads."""
    if not causal:
      return blocks
    first = max(0, (block * size - window + 1) // size) if window else 0
    return block + 1 - first

  return f"splash_{sum(map(keys, range(blocks)))}_of_{blocks**2}_blocks"
