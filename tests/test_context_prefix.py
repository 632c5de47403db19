"""What recurrent layers exchange over a sharded sequence, against one loop over the shards."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sharding.context import halo_exchange, prefix_state_exchange
from sharding.plan import count_collectives

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def over_shards(fn, n, **kwargs):
    """`fn` on arrays whose first axis is the shard."""
    mesh = jax.make_mesh((n,), ("c",), (AxisType.Auto,), devices=jax.devices()[:n])

    def local(*args):
        return fn(*(x[0] for x in args))[None]

    return jax.shard_map(local, mesh=mesh, in_specs=P("c"), out_specs=P("c"), **kwargs)


def entering(a, b, matrix):
    """The states that enter the shards, one after the other; NumPy or JAX."""
    h, states = b[0] * 0, []
    for ar, br in zip(a, b, strict=True):
        states.append(h)
        h = (ar @ h if matrix else ar * h) + br
    return states


def maps(seed, n, matrix, resets):
    random = np.random.default_rng(seed)
    a = random.uniform(-1, 1, (n, 2, 3, 3) if matrix else (n, 2, 3, 1))
    a[random.random(n) < resets] = 0
    return a, random.standard_normal((n, 2, 3, 4)), random.standard_normal((n, 2, 3, 4))


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
def test_states_and_gradients_are_those_of_one_loop(n, matrix):
    exchange = over_shards(lambda a, b: prefix_state_exchange(a, b, "c", matrix=matrix), n)

    @quick_jit
    def both(a, b, g):
        loop = lambda a, b: jnp.stack(entering(a, b, matrix))  # noqa: E731
        pulled = [jax.vjp(f, a, b)[1](g) for f in (exchange, loop)]
        return exchange(a, b), *pulled

    @settings(max_examples=6, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3]))
    def check(seed, resets):
        a, b, g = maps(seed, n, matrix, resets)
        states, got, expected = both(a, b, g)
        np.testing.assert_allclose(states, entering(a, b, matrix), rtol=1e-12, atol=1e-12)
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)

    with jax.enable_x64(True):
        check()


def test_a_recurrence_over_a_sharded_sequence_is_the_whole_one():
    """Decay and resets at any token; each shard collapses to one pair."""
    n, t = 4, 5
    random = np.random.default_rng(0)
    a, b = random.uniform(0, 1, n * t), random.standard_normal((n * t, 3))
    a[random.choice(n * t, 6)] = 0

    def local(a, b):
        def step(carry, ab):
            product, h = carry
            product, h = product * ab[0], ab[0] * h + ab[1]
            return (product, h), (product, h)

        start = (jnp.ones_like(a[0]), jnp.zeros_like(b[0]))
        (product, end), (products, states) = jax.lax.scan(step, start, (a, b))
        return states + products[:, None] * prefix_state_exchange(product, end, "c")

    h, whole = np.zeros(3), []
    for ai, bi in zip(a, b, strict=True):
        h = ai * h + bi
        whole.append(h)
    with jax.enable_x64(True):
        got = over_shards(local, n)(jnp.asarray(a.reshape(n, t)), jnp.asarray(b.reshape(n, t, 3)))
    np.testing.assert_allclose(np.reshape(got, (-1, 3)), whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_one_pair_moves_a_logarithmic_number_of_times(n):
    exchange = over_shards(lambda a, b: prefix_state_exchange(a, b, "c"), n)
    pair = [jnp.ones((n, 2, 1)), jnp.ones((n, 2, 3))]
    hops = math.ceil(math.log2(n))
    # The product of the last hop is not needed: it is dropped before the program runs.
    expected = (2 * hops - 1, hops * 2 * 3 * 4 + (hops - 1) * 2 * 4)
    assert count_collectives(exchange, *pair) == ({"ppermute": expected} if n > 1 else {})


def test_the_type_is_that_of_the_added_part_and_constants_may_be_replicated():
    def local(b):
        return prefix_state_exchange(jnp.float32(0.5), b, "c")

    b = jnp.arange(1.0, 9.0, dtype=jnp.bfloat16).reshape(8, 1)
    out = over_shards(local, 8)(b)
    assert out.dtype == jnp.bfloat16
    expected = np.stack(entering(np.full(8, 0.5), np.arange(1.0, 9.0)[:, None], False))
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=1e-2)


def test_without_varying_types_gradients_are_the_same():
    a, b, g = (jnp.asarray(x, jnp.float32) for x in maps(1, 8, True, 0.0))

    def pulled(check_vma):
        exchange = over_shards(
            lambda a, b: prefix_state_exchange(a, b, "c", matrix=True), 8, check_vma=check_vma
        )
        return jax.vjp(exchange, a, b)[1](g)

    for x, y in zip(pulled(True), pulled(False), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("width", [0, 1, 3])
def test_a_halo_is_the_end_of_the_shard_before(n, width):
    x = np.random.default_rng(2).standard_normal((n, 2, 3, 4)).astype(np.float32)
    g = np.random.default_rng(3).standard_normal((n, 2, 3 + width, 4)).astype(np.float32)
    exchange = over_shards(lambda x: halo_exchange(x, width, "c"), n)
    out, pull = jax.vjp(exchange, jnp.asarray(x))
    whole = np.concatenate([np.zeros((2, width, 4), np.float32), *x], 1)
    expected = np.stack([whole[:, 3 * r : 3 * r + 3 + width] for r in range(n)])
    np.testing.assert_array_equal(out, expected)
    back = g[:, :, width:].copy()
    back[:-1, :, 3 - width :] += g[1:, :, :width]
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], back, rtol=1e-6)


def test_a_halo_may_lie_on_any_axis_and_over_two_mesh_axes():
    mesh = jax.make_mesh((2, 4), ("r", "c"), (AxisType.Auto,) * 2)
    spec = P(None, None, ("r", "c"))
    exchange = lambda x: halo_exchange(x, 1, ("r", "c"), axis=-1)  # noqa: E731
    x = jnp.arange(32.0).reshape(2, 1, 16)
    out = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec)(x)
    shards = np.split(np.asarray(x), 8, -1)
    before = [np.zeros((2, 1, 1)), *(s[..., -1:] for s in shards[:-1])]
    expected = np.concatenate([y for pair in zip(before, shards, strict=True) for y in pair], -1)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: halo_exchange(x, 5, "c"), "width=5 must be between 0 and the 4 entries"),
        (lambda x: halo_exchange(x, -1, "c"), "width=-1 must be between 0 and the 4 entries"),
        (
            lambda x: prefix_state_exchange(x[:2], x, "c"),
            r"a \(2, 4\) must broadcast to b \(3, 4\)",
        ),
        (
            lambda x: prefix_state_exchange(x, x, "c", matrix=True),
            r"a \(3, 4\) must be \[..., k, k\] for b \(3, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        over_shards(call, 2)(jnp.zeros((2, 3, 4)))
