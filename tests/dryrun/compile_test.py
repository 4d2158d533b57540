"""Tests that the real step is compiled for TPUs that are not attached.

Tests that need libtpu are skipped if it is missing.
"""

import importlib.util
import math

import jax
import pytest
import tiny

from moe_jax.dryrun import compile
from moe_jax.dryrun.machine import topology
from moe_jax.errors import ConfigError
from moe_jax.hlo.program import analyse

pytestmark = pytest.mark.smoke
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[dryrun]'"
)


def test_the_sizes_of_an_out_of_memory_message():
  # The message is libtpu 0.0.42's. Catches two sizes that are swapped, units that are ignored, and
  # another error that is swallowed.
  v4 = topology.parse("v4:4x4x4")
  said = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(42.33G) exceeds available HBM (512.50M)."
  )
  assert compile._shortage(RuntimeError(said), v4) == {"needs": 42.33 * 2**30, "has": 512.5 * 2**20}
  unknown = compile._shortage(RuntimeError("RESOURCE_EXHAUSTED: no sizes"), v4)
  assert math.isnan(unknown["needs"]) and unknown["has"] == v4.chip.memory
  with pytest.raises(RuntimeError, match="INTERNAL"):
    compile._shortage(RuntimeError("INTERNAL: 4G of 5G"), v4)


def test_jaxs_own_cache_is_off_only_meanwhile():
  # Catches programs for absent machines in JAX's cache, where JAX cannot read them, and a cache
  # that stays off.
  before = jax.config.jax_enable_compilation_cache
  with compile._without_cache():
    assert not jax.config.jax_enable_compilation_cache
  assert jax.config.jax_enable_compilation_cache == before


def test_a_mesh_that_leaves_devices_idle_is_refused(tmp_path):
  # Catches a plan for fewer devices than the machine has, which would show the memory of a smaller
  # machine.
  config = tiny.config(tmp_path, mesh__data=2)
  with pytest.raises(ConfigError, match="use them all"):
    compile.make_mesh(config, topology.parse("v5e:2x2"), [])


def test_batches_are_what_the_pipelines_make(tmp_path):
  # Catches an encoder's inputs that are forgotten, and a layout that differs from the loop's.
  config = tiny.config(tmp_path, mesh__data=4, train__batch_size=8)
  mesh = jax.make_mesh(
    (4, 1, 1, 1), ("data", "fsdp", "expert", "tensor"), devices=jax.devices()[:4]
  )
  batch = compile.abstract_batch(config, mesh)
  assert set(batch) == {"inputs", "targets", "segment_ids", "positions"}
  assert batch["inputs"].shape == (8, 32) and batch["inputs"].sharding.shard_shape((8, 32)) == (
    2,
    32,
  )
  config.data.objective, config.data.encoder_len = "span_corruption", 48
  assert compile.abstract_batch(config, mesh)["encoder_tokens"].shape == (8, 48)


@needs_libtpu
def test_a_step_for_four_chips(tmp_path, monkeypatch):
  # Catches a program for the host's platform instead of TPUs, devices that do not communicate,
  # memory figures of 0, and a program that is compiled twice.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  config = tiny.config(
    tmp_path,
    mesh__expert=4,
    mesh__data=1,
    model__moe__dispatcher__name="grouped",
    model__vocab_size=264,
  )
  machine = topology.parse("v5e:2x2")
  mesh = compile.make_mesh(config, machine, topology.make_devices(machine))
  lowered = compile.lower(config, mesh)
  # This is the branch of `grouped` for TPUs. On a CPU it has loops over chunks instead.
  assert "ragged_dot" in lowered.stage.as_text()
  facts = compile.compile(lowered, machine, fast=True)
  assert not facts["cached"] and 0 < facts["arguments"] <= facts["peak"] < machine.chip.memory
  assert (
    any(word in facts["text"] for word in ("all-gather", "all-to-all"))
    and "all-reduce" in facts["text"]
  )
  assert compile.compile(compile.lower(config, mesh), machine, fast=True) == facts | {
    "cached": True
  }


@needs_libtpu
def test_what_does_not_fit_says_so(tmp_path, monkeypatch):
  # The 2^21 x 4096 weights in float32 need 32 GiB. Catches an error of JAX that is not translated,
  # and sizes that are not read from it.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  config = tiny.config(tmp_path, model__vocab_size=2**21, model__d_model=4096, train__batch_size=1)
  machine = topology.parse("v5e:1x1")
  lowered = compile.lower(
    config, compile.make_mesh(config, machine, topology.make_devices(machine))
  )
  # The second result comes from the cache.
  for _ in range(2):
    with pytest.raises(compile.DoesNotFit) as error:
      compile.compile(lowered, machine, fast=True)
    assert error.value.needs > 32 * 2**30 > error.value.has > 15 * 2**30


@needs_libtpu
def test_long_rows_have_the_kernel_of_tpus(tmp_path, monkeypatch):
  # Catches attention whose scores are computed outside of the kernel, or the kernels of one head or
  # row on all devices, text of a kernel that cannot be parsed, and a kernel whose FLOPs are not
  # counted. The matmuls of attention are the kernel's only: two forward, and seven backward.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  length, heads, width = 1024, 4, 32
  machine = topology.parse("v5e:2x2")

  def flops(kernel):
    config = tiny.config(
      tmp_path,
      mesh__data=2,
      mesh__tensor=2,
      model__vocab_size=264,
      model__num_heads=heads,
      model__num_kv_heads=heads,
      model__head_dim=width,
      model__attention_kernel=kernel,
      data__seq_len=length,
      train__batch_size=4,
    )
    lowered = compile.lower(
      config, compile.make_mesh(config, machine, topology.make_devices(machine))
    )
    text = compile.compile(lowered, machine, fast=True)["text"]
    assert ("splash_mha_fwd" in text) == (kernel == "auto")
    return analyse(text, dict(lowered.mesh.shape)).flops

  # Of four blocks, three are computed by the kernel. By blocks of queries, a half and all keys are
  # read by a half of the queries each, and the backward pass computes scores once more.
  squares = 2 * 4 * heads // 4 * length**2 * width * 3 / 4
  assert flops("auto") - flops("blocks") == pytest.approx((2 + 7 - 7) * squares, rel=0.02)
