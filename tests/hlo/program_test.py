"""Tests whole programs against arithmetic, XLA, their unrolled form and other platforms."""

import collections
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import assembly, sharding
from moe_jax.hlo.flops import hlo_matmul_flops
from moe_jax.hlo.program import analyse
from moe_jax.training import optimizers
from moe_jax.training import state as states
from moe_jax.training import step as steps

pytestmark = pytest.mark.unit
SNIPPETS = pathlib.Path(__file__).parent / "snippets"
SIZES = {"data": 2, "expert": 2, "model": 2}
D, F = 64, 128


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh(
    tuple(SIZES.values()), tuple(SIZES), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )


def array(mesh, shape, *spec):
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def compiled(function, *args):
  return tiny.quick_jit(function).lower(*args).compile()


def totals(program):
  """Returns a dictionary from (kind, axes) to bytes in a step."""
  sums = collections.Counter()
  for one in program.collectives:
    sums[one.kind, one.axes] += one.bytes * one.count
  return sums


def moe_step(mesh, layers, unroll):
  """Returns the compiled gradients of a stack of expert layers.

  Each layer gathers its weights, splits its width, and exchanges its rows with other devices before
  and after its products.
  """

  def loss(x, w1, w2):
    def layer(x, w):
      a, b = (jax.lax.all_gather(v, "data", tiled=True) for v in w)
      h = jax.lax.all_to_all(x.reshape(2, -1, D), "expert", 0, 1, tiled=True)
      y = jax.lax.psum(jnp.tanh(h @ a) @ b, "model")
      return jax.lax.all_to_all(y, "expert", 1, 0, tiled=True).reshape(x.shape), None

    return jnp.sum(jnp.square(jax.lax.scan(layer, x, (w1, w2), unroll=unroll)[0]))

  specs = (P(("data", "expert")), P(None, "data", "model"), P(None, ("model", "data")))
  step = jax.shard_map(
    jax.grad(loss, (0, 1, 2)), mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False
  )
  shapes = ((128, D), (layers, D, F), (layers, F, D))
  return compiled(
    step, *(array(mesh, shape, *spec) for shape, spec in zip(shapes, specs, strict=True))
  )


def test_a_scan_counts_as_what_it_unrolls_to(mesh):
  # Catches loops that are counted once, backward loops that are missed, counts that are multiplied
  # twice, and axes that depend on how the compiler writes groups. By hand, there are 3 layers of 2
  # products of 32 rows, and each product has 2 more for its gradients.
  scanned, unrolled = moe_step(mesh, 3, 1), moe_step(mesh, 3, True)
  a, b = analyse(scanned.as_text(), SIZES), analyse(unrolled.as_text(), SIZES)
  assert a.flops == b.flops == b.flops_once == 3 * 2 * 3 * 2 * 32 * D * (F // 2)
  assert a.flops_once == a.flops / 3 and a.unknown_loops == b.unknown_loops == 0
  assert totals(a) == totals(b)
  assert {key for key in totals(a) if key[0] == "all-to-all"} == {("all-to-all", ("expert",))}
  assert totals(a)["all-to-all", ("expert",)] == 3 * 4 * 32 * D * 4
  assert totals(a)["all-gather", ("data",)] == 3 * 2 * D * (F // 2) * 4
  assert a.cycles is None and 0.5 < a.hbm_bytes / b.hbm_bytes < 2


@pytest.mark.parametrize("axis", SIZES)
def test_exchanges_are_put_to_their_axis(mesh, axis):
  # Catches partitions that are numbered in another order than the mesh's devices.
  def exchange(x):
    return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)

  step = jax.shard_map(exchange, mesh=mesh, in_specs=P(tuple(SIZES)), out_specs=P(tuple(SIZES)))
  [found] = analyse(compiled(step, array(mesh, (64, D), tuple(SIZES))).as_text(), SIZES).collectives
  assert (found.kind, found.axes, found.group_size) == ("all-to-all", (axis,), 2)
  assert (found.bytes, found.wire_bytes, found.count, found.dtype) == (
    8 * D * 4,
    4 * D * 4,
    1.0,
    "f32",
  )


def test_products_agree_with_arithmetic_and_with_xla(mesh):
  # Catches a wrong count of the depth, the batch or the devices, by comparison with 2mnk and with
  # cost_analysis().
  def products(a, b, c):
    return jnp.tanh(a @ b), jnp.einsum("bik,bjk->bij", c, c)

  done = compiled(
    products,
    array(mesh, (512, 256), "data"),
    array(mesh, (256, 512), None, "model"),
    array(mesh, (4, 128, 64), "expert"),
  )
  program = analyse(done.as_text(), SIZES)
  assert program.flops == program.flops_once == 2 * 256 * 256 * 256 + 2 * 2 * 128 * 128 * 64
  assert done.cost_analysis()["flops"] == pytest.approx(program.flops_once, rel=0.01)


def test_a_training_step_of_this_repository(tmp_path):
  # Catches HLO that a real step has but tiny programs lack, a loop over layers that is not
  # understood, and FLOPs that differ from those of `moe_jax.hlo.flops`, which sums over loops and
  # branches in another way.
  sizes = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
  config = tiny.config(tmp_path, model__num_layers=4, **{f"mesh__{k}": n for k, n in sizes.items()})
  mesh = sharding.make_mesh(sizes)
  model = assembly.model(config, 264, mesh)
  optimizer, schedule = optimizers.make(
    optimizers.OptimizerOptions.of(config.optimizer), config.train.steps
  )
  step = functools.partial(
    steps.train_step,
    model=model,
    optimizer=optimizer,
    schedule=schedule,
    loss_weights=assembly.loss_weights(config),
  )
  state, _ = states.create(mesh, model, optimizer, 0, config.data.seq_len, config.train.batch_size)
  rows = jax.ShapeDtypeStruct(
    (config.train.batch_size, config.data.seq_len), np.int32, sharding=sharding.batch_sharding(mesh)
  )
  with jax.set_mesh(mesh):
    text = compiled(
      step, state, dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), rows)
    ).as_text()
  program = analyse(text, mesh.shape)
  assert (
    program.unknown_loops == 0
    and program.flops == hlo_matmul_flops(text) > 1.5 * program.flops_once
  )
  axes = collections.defaultdict(set)
  for one in program.collectives:
    axes[one.kind].update(one.axes)
  assert axes["all-gather"] | axes["all-reduce"] == {"fsdp", "expert", "tensor"}
  # Permutes may swap two axes, so that their groups are not boxes of the mesh.
  assert not any("?" in along for kind, along in axes.items() if kind != "collective-permute")


@pytest.mark.parametrize("name", ["cpu_step", "h100_step", "v5p_step"])
def test_platforms_agree(name):
  # Catches forms of one platform that are misread: the TPU's dots as convolutions, the GPU's
  # asynchronous pairs, and the CPU's all-to-alls of tuples. The TPU sends values in bfloat16 that
  # it would round anyway, and it scatters by an all-reduce.
  program = analyse((SNIPPETS / f"{name}.hlo").read_text(), SIZES)
  assert (
    program.flops == 3 * program.flops_once == 3 * 2 * 2 * 32 * D * D and program.unknown_loops == 0
  )
  words = {"f32": 1.0, "bf16": 2.0}
  sums = collections.Counter()
  for one in program.collectives:
    sums[one.kind, one.axes] += one.bytes * one.count * words[one.dtype]
  last = "all-reduce" if name == "v5p_step" else "reduce-scatter"
  assert sums == {
    ("all-gather", ("data",)): 3 * 2 * D * D * 4,
    ("all-to-all", ("expert",)): 3 * 2 * 32 * D * 4,
    ("all-reduce", ("model",)): 3 * 32 * D * 4,
    (last, ("data", "expert")): 32 * D * 4,
  }
  assert (program.cycles is not None) == (name == "v5p_step")


def test_a_product_in_a_ring_of_permutes():
  # Catches a loop of a windowed product whose iterations are taken for shards, although each
  # handles several shards.
  program = analyse((SNIPPETS / "v4_windowed.hlo").read_text(), {"model": 8})
  [permutes] = program.collectives
  assert program.flops == 2 * 1024 * 8192 * 8192
  assert (permutes.kind, permutes.axes, permutes.group_size) == (
    "collective-permute",
    ("model",),
    8,
  )
  assert permutes.count == 9 and permutes.wire_bytes == permutes.bytes == 1024 * 8192 * 2


def test_a_collective_in_several_fusions_counts_once():
  # Catches four gathers that are counted for the four fusions which each carry a part of one
  # gather.
  [gather] = analyse((SNIPPETS / "v5e_async_fusions.hlo").read_text(), SIZES).collectives
  assert (gather.kind, gather.axes, gather.bytes, gather.count) == (
    "all-gather",
    ("data",),
    2 * 256 * 256 * 2,
    1,
  )


def test_fusions_that_scatter():
  # Catches all-reduces inside fusions that are overlooked, or that are counted as another kind.
  # Their names come from the fusion around them.
  program = analyse((SNIPPETS / "v4_reduce_scatter.hlo").read_text(), SIZES)
  assert sorted((one.kind, one.axes, one.bytes) for one in program.collectives) == [
    ("all-reduce", ("data",), 262144),
    ("reduce-scatter", ("data",), 65536),
    ("reduce-scatter", ("data",), 262144),
  ]
  assert all(one.op_name.startswith("jit(step)/transpose(") for one in program.collectives)


def test_cycles_are_multiplied_out():
  # Catches a loop's body whose estimate is counted once. The inner body runs 5 times 7 times, and
  # the outer body runs 7 times.
  text = (SNIPPETS / "v5p_nested.hlo").read_text()
  once = analyse(text.replace("direction=LT", "direction=EQ"), SIZES)  # 0 trips
  assert analyse(text, SIZES).cycles > 35 * 2000 and (once.cycles or 0) < 5000


def test_another_machines_program():
  # Catches axes that are read from a mesh for which the program was not compiled.
  with pytest.raises(ValueError, match="8 devices.*mesh of 4"):
    analyse((SNIPPETS / "cpu_step.hlo").read_text(), {"data": 4})


def test_memory_is_charged_to_operations_not_to_their_insides():
  # Catches values inside a fusion that are counted as traffic. By hand, each of three iterations
  # reads 256 bytes and writes 256 bytes.
  text = """HloModule m

%inside (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0)
  %d = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = f32[8,8] tanh(%d)
}

%body (y: f32[8,8]) -> f32[8,8] {
  %y = f32[8,8] parameter(0)
  ROOT %f = f32[8,8] fusion(%y), kind=kOutput, calls=%inside
}

%go (z: f32[8,8]) -> pred[] {
  %z = f32[8,8] parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8] parameter(0)
  ROOT %w = f32[8,8] while(%a), condition=%go, body=%body, backend_config=TRIPS
}
""".replace("TRIPS", '{"known_trip_count":{"n":"3"}}')
  program = analyse(text, {"data": 1})
  assert (program.hbm_bytes, program.flops) == (3 * 512, 3 * 1024)
