"""What a preflight reckons with, against numbers worked out by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from warm_jax.accelerators import flops, hlo, roofline, topology
from warm_jax.preflight import table
from warm_jax.runtime import mesh
from warm_jax.sampling import batches
from warm_jax.training import step

F32 = 4


# ── Topologies ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "devices", "link"),
    [
        ("v5e:4x4", 16, 200e9),  # 1600 Gbit/s a chip
        ("v4:2x2x4", 16, 300e9),
        ("v5p:4x8x8", 256, 600e9),
        ("v6e:1x1", 1, 400e9),
        ("gpu:h100x8", 8, 450e9),  # NVLink inside a host, a 400 Gbit/s card a GPU between hosts
        ("gpu:h200x64", 64, 50e9),
        ("gpu:a100x1", 1, 300e9),
        ("gpu:a100-40gbx8", 8, 300e9),
        ("cpu:8", 8, 0),
    ],
)
def test_topologies(text, devices, link):
    (target,) = topology.parse(text)
    assert (target.devices, target.link, target.text) == (devices, link, text)


def test_smallest_grows():
    sizes = [target.devices for target in topology.parse("v5e:smallest")]
    assert sizes == [1, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize(
    "text",
    [
        *("", "v5e", "v5e:3x3", "v5e:4x4x4", "v7:4x4", "v4:4x4", "tpu", "v5e:32x32", "cpu:0", "cpu:x", "cpu:257"),
        *("cpu:-1", "gpu:h100", "gpu:b9x8", "gpu:h100x0", "gpu:h100x9", "gpu:h100x512", "gpu:smallest"),
    ],
)
def test_no_such_topology(text):
    with pytest.raises(ValueError, match=re.escape(f"--topology={text}")) as error:
        topology.parse(text)
    assert "v5e: 1x1, 2x2, 2x4, 4x4" in str(error.value) or "GPUs; give 1 to 8, or a multiple of 8" in str(error.value)


# ── FLOPs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def counted(function, *shapes, dtype=jnp.float32):
    return flops.count(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)))


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def exact(a, b):
    return jnp.matmul(a, b, precision="highest")


PRODUCT = 2 * 5 * 7 * 3  # [5, 7] @ [7, 3]
WINDOWS = 2 * (4 * 8 * 6) * (3 * 3 * 10) * 12  # [4, 8, 6, 10] with a 3×3 kernel to 12 channels


def test_flops_of_a_product_by_hand():
    assert counted(exact, (5, 7), (7, 3)) == (0, PRODUCT)
    assert counted(jnp.matmul, (5, 7), (7, 3)) == (PRODUCT, 0)  # at the backend's own precision
    assert counted(exact, (5, 7), (7, 3), dtype=jnp.bfloat16) == (PRODUCT, 0)
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (9, 5, 7), (9, 7, 3)).total == 9 * PRODUCT
    assert counted(lambda a: jnp.exp(a) + a, (100, 100)).total == 0


def test_flops_of_a_convolution_by_hand():
    assert counted(conv, (4, 8, 6, 10), (3, 3, 10, 12)).total == WINDOWS
    # Forward, and as much again for the gradient of each argument.
    gradient = jax.grad(lambda x, kernel: jnp.sum(conv(x, kernel) ** 2), argnums=(0, 1))
    assert counted(gradient, (4, 8, 6, 10), (3, 3, 10, 12)).total == 3 * WINDOWS


def test_flops_of_loops_branches_and_recomputation():
    def scanned(a, b):
        return jax.lax.scan(lambda a, _: (exact(a, b), None), a, length=6)[0]

    assert counted(scanned, (7, 7), (7, 7)).total == 6 * 2 * 7**3
    assert (
        counted(lambda a, b: jax.lax.cond(a[0, 0] > 0, exact, lambda a, b: a, a, b), (7, 7), (7, 7)).total == 2 * 7**3
    )

    def twice(a, b):
        return jnp.sum(jnp.tanh(exact(jnp.tanh(exact(a, b)), b)))

    plain, again = jax.grad(twice, argnums=(0, 1)), jax.grad(jax.checkpoint(twice), argnums=(0, 1))
    assert counted(plain, (7, 7), (7, 7)).total == 6 * 2 * 7**3
    assert counted(again, (7, 7), (7, 7)).total == 8 * 2 * 7**3


def test_flops_of_a_train_step():
    """Work is by the image, and the blurs are at full precision: of each image, the DCT matrices of each side."""
    few, many = (flops.count(step.trace_step(tiny.build(train__batch_size=n)).jaxpr) for n in (16, 32))
    assert many == few.times(2)
    transform = 2 * 2 * 28**3  # over rows, over columns
    assert few.float32 % (16 * transform) < 0.05 * few.float32  # whole transforms; the rest is the class embedding's
    assert few.float32 >= 16 * 2 * transform  # there and back


# ── Memory and wires ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_sizes_of_shapes():
    assert hlo.size("f32[3,5]{1,0}") == 60
    assert hlo.size("(bf16[8]{0}, /*index=5*/pred[3]{0}, (u8[2,2]{1,0}, s32[]))") == 16 + 3 + 4 + 4
    # Tiles of a TPU: the most minor axis (here the width, 28) to 128, the next (the height) to 8.
    assert hlo.size("f32[4,28,28,1]{2,1,0,3:T(8,128)}", in_memory=True) == 4 * 4 * 32 * 128
    assert hlo.size("f32[4,28,28,1]{2,1,0,3:T(8,128)}") == 4 * 4 * 28 * 28
    assert hlo.size("bf16[16,256]{1,0:T(8,128)(2,1)S(1)}", in_memory=True) == 0


HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%q), index=1
  %j = s32[] get-tuple-element(%q), index=0
  %moved = f32[8]{0} collective-permute(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[8]{0}) tuple(%j, %moved)
}

ENTRY %main (g: f32[100], h: bf16[10,10], x0: f32[8]) -> f32[8] {
  %g = f32[100]{0} parameter(0)
  %h = bf16[10,10]{1,0} parameter(1)
  %x0 = f32[8]{0} parameter(2)
  %s = ((f32[100]{0}, bf16[10,10]{1,0})) all-reduce-start(%g, %h), channel_id=1, replica_groups=[2,4]<=[8]
  %d = (f32[100]{0}, bf16[10,10]{1,0}) all-reduce-done(%s)
  %again = (f32[100]{0}, bf16[10,10]{1,0}) all-reduce(%g, %h), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %gather = f32[400]{0} all-gather(%g), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %scatter = f32[50]{0} reduce-scatter(%g), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %x0)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%cond, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_by_hand():
    found = {one.kind: one for one in hlo.traffic(HLO, 8).collectives}
    assert found["all-reduce"] == ("all-reduce", 1, 600, 900)  # 2 · 3/4: groups of four
    assert found["all-gather"] == ("all-gather", 1, 1600, 1200)
    assert found["reduce-scatter"] == ("reduce-scatter", 1, 400, 200)  # groups of two
    assert found["collective-permute"] == ("collective-permute", 5, 5 * 32, 5 * 32)  # as often as the loop runs
    assert hlo.traffic(HLO, 8).unknown_loops == 0
    assert hlo.traffic(HLO.replace("direction=LT", "direction=NE"), 8).unknown_loops == 1


def test_a_slice_is_read_and_not_the_whole():
    """As a TPU fetches a part of an array into its own memory."""
    text = """ENTRY %main (a: f32[64,128]) -> f32[8,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %s = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:8], [0:128]}
  ROOT %d = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s)
}
"""
    assert hlo.traffic(text, 1).memory == F32 * 8 * 128 + 4  # and a word to wait on


def test_a_kernel_that_slices_reads_the_slice():
    """As XLA takes one gradient out of many that were reduced together: 4 KB in, 4 KB out, of 4 MB."""
    text = """%slicing (p: f32[1000000], q: f32[1000]) -> f32[1000] {
  %p = f32[1000000]{0} parameter(0)
  %q = f32[1000]{0} parameter(1)
  %b = f32[1000000]{0} bitcast(%p)
  %s = f32[1000]{0} slice(%b), slice={[5000:6000]}
  ROOT %sum = f32[1000]{0} add(%s, %q)
}

ENTRY %main (a: f32[1000000], b: f32[1000]) -> f32[1000] {
  %a = f32[1000000]{0} parameter(0)
  %b = f32[1000]{0} parameter(1)
  ROOT %f = f32[1000]{0} fusion(%a, %b), kind=kLoop, calls=%slicing
}
"""
    assert hlo.traffic(text, 1).memory == 3 * F32 * 1000
    also_whole = text.replace("%s = f32", "%n = f32[1000000]{0} negate(%b)\n  %s = f32")
    assert hlo.traffic(also_whole, 1).memory == F32 * (1_000_000 + 2000)
    of_a_sum = text.replace("%b = f32[1000000]{0} bitcast(%p)", "%b = f32[1000000]{0} add(%p, %p)")
    assert hlo.traffic(of_a_sum, 1).memory == 3 * F32 * 1000  # no more of the sum is computed
    on_chip = text.replace("%a = f32[1000000]{0}", "%a = f32[1000000]{0:S(1)}")
    assert hlo.traffic(on_chip, 1).memory == 2 * F32 * 1000


def spread(function, *shapes):
    """The compiled program of `function` on shards over eight devices."""
    over = mesh.make_mesh(8)
    mapped = jax.shard_map(function, mesh=over, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=mesh.split(over)) for shape in shapes]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def test_collectives_of_real_programs():
    def ring(x):
        return jax.lax.scan(lambda x, _: (jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]), None), x,
                            length=6)[0]  # fmt: skip

    (reduced,) = hlo.traffic(spread(lambda x: x + jax.lax.psum(x, "data"), (80, 5)), 8).collectives
    assert reduced == ("all-reduce", 1, F32 * 10 * 5, F32 * 10 * 5 * 2 * 7 // 8)
    (gathered,) = hlo.traffic(spread(lambda x: x @ jax.lax.all_gather(x, "data"), (80, 10)), 8).collectives
    assert gathered[:3] == ("all-gather", 1, F32 * 800)
    (moved,) = hlo.traffic(spread(ring, (80,)), 8).collectives
    assert moved == ("collective-permute", 6, 6 * F32 * 10, 6 * F32 * 10)


def test_memory_traffic_of_a_real_program():
    """Two arrays in, one out, in one kernel; on CPU devices XLA's own count says the same."""
    text = spread(lambda a, b: jnp.tanh(a) * b, (800, 100), (800, 100))
    assert hlo.traffic(text, 8).memory == 3 * F32 * 100 * 100
    assert hlo.traffic(text, 8).collectives == ()


def compiled_text(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def looped(x):
    """A kernel within a loop: of a carry [n] and each row of [6, n] the sum, for six rows."""
    return jax.lax.scan(lambda total, row: (jnp.sin(total + row), None), x[0], x)[0]


KERNELS = {  # and how many numbers they read and write
    "copy": (lambda a: a + 1, [(100, 200)], 2 * 20_000),
    "sum to one": (lambda a: jnp.sum(a * a), [(100, 200)], 20_000 + 1),
    "two kernels": (lambda a: (jnp.sin(a), jnp.cos(a)), [(100, 200)], 4 * 20_000),
    "broadcast": (lambda a, b: a * b, [(100, 200), (200,)], 2 * 20_000 + 200),
    "half": (lambda a: jnp.exp(a[:50]), [(100, 200)], 2 * 10_000),
    "product": (lambda a, b: a @ b, [(100, 200), (200, 300)], 20_000 + 60_000 + 30_000),
    "one row of many": (lambda a: jax.lax.dynamic_slice(a, (7, 0), (1, 200)) + 1, [(100, 200)], 2 * 200),
}


@pytest.mark.parametrize(("function", "shapes", "numbers"), KERNELS.values(), ids=KERNELS)
def test_memory_traffic_of_small_programs(function, shapes, numbers):
    """A few words more, of numbers that are constants."""
    moved = hlo.traffic(compiled_text(function, *shapes), 1).memory
    assert F32 * numbers <= moved <= F32 * numbers + 64


def test_memory_traffic_of_a_loop():
    """Six times: the carry read and written, and a row of the six."""
    moved = hlo.traffic(compiled_text(looped, (6, 10_000)), 1)
    assert moved.unknown_loops == 0
    assert F32 * 6 * 3 * 10_000 <= moved.memory <= F32 * (6 * 3 + 4) * 10_000


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_train_step_sends_its_gradients_once(accumulation, quick_compile):
    """Four bytes a parameter and slice, and besides them only the loss, its sums by noise level, and counts."""
    exp = tiny.build(train__accumulation=accumulation)
    compiled = step.compile_step(exp)
    params = step.abstract_state(exp).params
    gradients = F32 * sum(leaf.size for leaf in jax.tree.leaves(params))
    (reduced,) = hlo.traffic(compiled.as_text(), 8).collectives
    assert reduced.kind == "all-reduce"
    sums = F32 * (sum(np.size(x) for x in step.zero_totals()) + 1)
    assert gradients * accumulation <= reduced.bytes <= (gradients + 2 * sums) * accumulation


def test_sampling_sends_nothing_between_the_devices_of_a_process(quick_compile):
    """TPU compilers refuse collectives among a part of a slice, which is what one host of many has."""
    exp = tiny.build()
    draw = batches.Sampler(exp, batch_size=16)
    compiled = draw.trace(jax.eval_shape(exp.model.init, jax.random.key(0))).lower().compile()
    assert exp.mesh.size == 8
    assert hlo.traffic(compiled.as_text(), 8).collectives == ()


# ── Bounds and what is said of them ──────────────────────────────────────────────────────────────────────────────────


def test_roofline_by_hand():
    (target,) = topology.parse("v5e:4x4")
    made = roofline.roofline(target, flops.Flops(bfloat16=197e9, float32=197e9), moved=819e6, sent=200e6)
    assert made.compute == pytest.approx(1e-3 + 6e-3)  # six passes at full precision
    assert made.memory == pytest.approx(1e-3)
    assert made.network == pytest.approx(1e-3)
    assert (made.seconds, made.limit) == (pytest.approx(8e-3), "computing")
    assert made.intensity == pytest.approx(2 * 197e9 / 819e6)
    assert made.ridge == pytest.approx(197e12 / 819e9)
    with pytest.raises(ValueError, match="no rates"):
        roofline.roofline(topology.parse("cpu:8")[0], flops.Flops(), 1.0, 0.0)


FIRST_COUNT = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (60.38G) exceeds "
    "available HBM (15.75G)."
)


def refused(total, *, topology_text="v5e:2x2", **changes):
    """What is found of a train step that wants `total` bytes a chip."""
    (target,) = topology.parse(topology_text)
    row = {
        "batch": 256,
        "devices": 8,
        "flops": {"bfloat16": 1e12, "float32": 0.0},
        "seconds_to_compile": 1.0,
        "cpu_seconds": 1.0,
    }
    found = {"topology": target.text, "chip": target.chip._asdict(), "devices": target.devices, "link": target.link}
    found |= {
        "batch_size": 256,
        "accumulation": 1,
        "remat": [],
        "dtype": "bfloat16",
        "parameters": 2**26,
        "state_bytes": 2**30,
    }
    found |= {"images_in_all": 10**6, "sides": [64, 32], "patch_size": 1, "assumed": ["nothing"], "fits": False}
    return found | {"programs": {"train step": row | {"memory": {"total": total}, "fits": False}}} | changes


def test_refusals_of_a_compiler():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 31.50G of 15.75G hbm. Exceeded …"
    assert table.out_of_memory(said, 1) == {"total": int(31.5 * 2**30), "available": int(15.75 * 2**30)}
    assert table.out_of_memory(FIRST_COUNT, 2**30) == {
        "arguments": 2**30,
        "temporaries": int(60.38 * 2**30),
        "total": int(60.38 * 2**30) + 2**30,
        "available": int(15.75 * 2**30),
        "first_count": True,
    }
    assert table.out_of_memory("RESOURCE_EXHAUSTED: who knows", 1) == {}
    assert table.out_of_memory("INVALID_ARGUMENT: no such thing", 1) is None


def test_a_first_count_says_what_helps_and_leaves_no_slice_out():
    """libtpu's words of lsun_church128 on one chip; on four of them it fits, by computing activations anew."""
    found = refused(0, topology_text="v5e:1x1")
    found["programs"]["train step"]["memory"] = table.out_of_memory(FIRST_COUNT, found["state_bytes"])
    said = table.text(found)
    assert re.search(r"total of 16.00 GiB +61.38 GiB", said) and re.search(r"temporaries +60.38 GiB", said)
    assert "--config.train.accumulation=8" in said  # 60.38 / 15 is more than 4
    assert table.needs(found) == ": 61.38 GiB of 16.00 GiB a chip"
    for target in topology.parse("v5e:smallest"):
        assert table.may_fit(found, target)


def test_what_does_not_fit_and_what_helps():
    """31 GiB wanted of 16, of which 1 GiB is state: the rest must halve."""
    said = table.text(refused(31 * 2**30))
    assert "DOES NOT FIT: train step" in said
    assert "--config.train.accumulation=2" in said
    assert "--config.train.batch_size=128" in said
    assert '--config.model.remat="(64,)"' in said
    assert "more chips" in said and "fsdp" not in said
    assert "fsdp" in table.text(refused(31 * 2**30, state_bytes=2**33))  # 8 GiB of state
    assert '"(64,32,)"' in table.text(refused(31 * 2**30, remat=[64])).replace(", ", ",")


def test_a_sampling_loop_that_does_not_fit():
    found = refused(2**30)
    found["programs"]["train step"]["fits"] = True
    found["programs"]["sampling loop"] = found["programs"]["train step"] | {"fits": False, "batch": 64}
    said = table.text(found)
    assert "DOES NOT FIT: sampling loop" in said and "--config.sample.batch_size=32" in said
    assert "train.batch_size" not in said


def test_larger_slices_that_cannot_fit_are_left_out():
    sizes = {target.text: target for target in topology.parse("v5e:smallest")}
    found = refused(100 * 2**30, topology_text="v5e:1x1")  # 1 + 99/4 > 16, 1 + 99/8 < 16
    assert not table.may_fit(found, sizes["v5e:2x2"])
    assert table.may_fit(found, sizes["v5e:2x4"])
