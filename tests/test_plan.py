"""Plans of programs that cannot run here: HLO read, collectives counted, the real TPU compiler."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.attention import blockwise_attention
from jaxlab.loops import loop_at_most
from sharding.hlo import Module
from sharding.plan import aot_memory, compile_report, count_collectives
from sharding.topology import CHIPS, chip_of, parse_topology, peak_flops

ROOT = Path(__file__).parent.parent
MESH = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)


def compiled(fn, *args, **kwargs):
    return jax.jit(fn, **kwargs).lower(*args).compile()


def test_collectives_of_a_shard_map_are_counted_in_the_program():
    def local(x, w):
        def step(c, _):
            return jax.lax.psum(c @ w, "b") / 4, None

        y, _ = jax.lax.scan(step, x, None, length=5)
        return jax.lax.all_gather(y, "a", tiled=True)

    fn = jax.shard_map(local, mesh=MESH, in_specs=(P("a"), P()), out_specs=P(None), check_vma=False)
    x, w = jnp.zeros((8, 16)), jnp.zeros((16, 16))
    got = count_collectives(fn, x, w)
    assert sum(calls for name, (calls, _) in got.items() if name.startswith("psum")) == 5
    assert sum(size for name, (_, size) in got.items() if name.startswith("psum")) == 5 * 4 * 16 * 4
    assert got["all_gather"] == (1, 4 * 16 * 4)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_loops_of_compiled_text_are_counted(length):
    """A scan of matmuls whose result is reduced over a mesh axis: one all-reduce a step."""

    @partial(jax.jit, out_shardings=NamedSharding(MESH, P(None, None)))
    def fn(x, w):
        def step(c, _):
            c = jax.lax.with_sharding_constraint(c, NamedSharding(MESH, P(None, "b")))
            c = c @ jax.lax.with_sharding_constraint(w, NamedSharding(MESH, P("b", None)))
            return jax.lax.with_sharding_constraint(c, NamedSharding(MESH, P(None, None))), None

        return jax.lax.scan(step, x, None, length=length)[0]

    module = Module(fn.lower(jnp.ones((8, 64)), jnp.ones((64, 64))).compile().as_text())
    found = [c for c in module.collectives() if c.kind == "all-reduce"]
    assert sum(c.calls for c in found) == length
    assert {c.bytes for c in found} == {8 * 64 * 4} and {c.group for c in found} == {4}
    assert not module.unknown_loops


def test_loops_that_name_their_bound_are_counted_in_compiled_text():
    def module(most):
        # A factor of its own: JAX's cache of compiled programs does not look at names, where bounds stand.
        fn = lambda n, x, w: loop_at_most(most, 0, n, lambda _, c: (c @ w) * (most + 0.5), x)  # noqa: E731
        return Module(compiled(fn, jnp.int32(1), jnp.ones((32, 32)), jnp.ones((32, 32))).as_text())

    one, five, nine = map(module, (1, 5, 9))
    step = (five.traffic() - one.traffic()) / 4
    assert step >= 3 * 4 * 32 * 32  # reads x and w, writes x
    assert nine.traffic() == one.traffic() + 8 * step
    assert not nine.unknown_loops


@pytest.mark.parametrize("causal", [True, False])
def test_no_loop_of_blockwise_attention_is_of_unknown_length(causal):
    def layer(q, _):
        y = blockwise_attention(q, q, q, causal=causal, window=20, block_q=16, block_k=16)
        return q + y, None

    layers = lambda q: jnp.sum(jax.lax.scan(layer, q, None, length=3)[0])  # noqa: E731
    module = Module(compiled(jax.grad(layers), jnp.ones((1, 64, 2, 8))).as_text())
    assert not module.unknown_loops
    times = {n for i, _, n in module.walk() if i.op in ("dot", "fusion", "custom-call")}
    assert 3 * 4 * 4 in times  # layers, blocks of queries, blocks of keys


def test_traffic_of_a_copy_is_what_it_reads_and_writes():
    x = jnp.ones((256, 256))
    module = Module(compiled(lambda x: x * 2 + 1, x).as_text())
    assert module.traffic() == 2 * x.nbytes


def test_memory_of_a_sharded_program_is_that_of_one_device():
    placed = NamedSharding(MESH, P("a", "b"))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=placed)
    report = aot_memory(jax.jit(lambda x: x + 1, out_shardings=placed), (x,))
    assert report.argument_bytes == report.output_bytes == 64 * 64 * 4 // 8
    assert report.peak_bytes >= 2 * 64 * 64 * 4 // 8 and report.seconds > 0


def test_donated_arguments_share_their_bytes():
    x = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=NamedSharding(MESH, P()))
    keep, give = (
        aot_memory(jax.jit(lambda x: x + 1, donate_argnums=d), (x,)).peak_bytes for d in ((), 0)
    )
    assert keep - give == 4096


def test_only_devices_of_the_slice_are_accepted():
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(MESH, P()))
    with pytest.raises(ValueError, match="args are placed on 8 devices .cpu."):
        compile_report(jax.jit(lambda x: x), (x,), topology="v5e:2x4")


@pytest.mark.parametrize(
    ("name", "shape", "devices"),
    [("v5p:2x2x2", (2, 2, 2), 8), ("v5e:16x16", (16, 16), 256), ("TPU7X:2x2x1", (2, 2, 1), 8)],
)
def test_slices_by_name(name, shape, devices):
    slice_ = parse_topology(name)
    assert slice_.shape == shape and slice_.devices == devices


@pytest.mark.parametrize(
    "name", ["v5p", "v5p:3x3x3", "v5e:2x2x2", "v5e:32x32", "v7:2x2", "v5p:2x2xa"]
)
def test_slices_that_do_not_exist_name_the_nearest(name):
    with pytest.raises(ValueError, match=r"nearest: v5|for example"):
        parse_topology(name)


def test_chips_are_known_by_their_device_kind():
    assert (
        chip_of("TPU v5 lite") is CHIPS["v5e"] and chip_of("NVIDIA H100 80GB HBM3") is CHIPS["H100"]
    )
    assert chip_of("NVIDIA GH200") is None and peak_flops("cpu", "float32") is None
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("TPU v4", "float16") is None


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu-aot (make test-slow)"
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.aot_tpu
@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ("--config tiny --topology v5e:2x4", "fits: needs"),
        ("--config llama3_8b --topology v5p:2x2x2", "fits: needs"),
        (
            "--config llama3_8b --topology v5e:2x4 model.layers=2 source.seq_len=131072",
            "does not fit",
        ),
    ],
)
def test_compile_prints_the_table_without_a_tpu(words, verdict, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-m", "configs", "compile", *words.split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=900, env=env | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert verdict in done.stdout and "FLOPs of a step" in done.stdout
    if verdict.startswith("fits"):
        assert "temporaries" in done.stdout and "all-gather" in done.stdout
    assert np.all([not p.name.startswith("runs") for p in tmp_path.iterdir()])
