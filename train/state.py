"""The train state and the pure train step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.rules import check_divisible, shardings
from train.objectives import Batch, Objective
from train.optimizer import join, split

Inputs = tuple[
    jax.ShapeDtypeStruct | None, ...
]  # what a module is initialised with: `run.model.inputs`


class TrainState(NamedTuple):
    """All that a run carries from step to step; every leaf is a sharded array."""

    step: Any  # int32, steps done
    params: Any
    opt: Any
    ema: Any  # averaged parameters, or {} when optimizer.ema is 0
    skipped: Any  # int32, steps skipped because loss or gradient was not finite
    bad_run: Any  # int32, how many of them in a row, up to now


def init_params(module, key: jax.Array, inputs: Inputs):
    """Parameters as a plain nested dict of arrays."""
    examples = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), inputs)
    return nn.unbox(module.init(key, *examples))["params"]


def logical_axes(module, inputs: Inputs):
    """Tree of logical axis names, one tuple a parameter, without computing anything."""
    boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    specs = nn.get_partition_spec(boxed)
    pad = lambda box, spec: tuple(spec) + (None,) * (len(box.shape) - len(spec))  # noqa: E731
    return jax.tree.map(
        pad, nn.unbox(boxed), specs, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )


def first_state(params, tx, ema: float, freeze: str) -> TrainState:
    """The state before the first step (jit it with `out_shardings`, so that it is born sharded)."""
    # Two counters must be two buffers: donation takes each only once.
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    average = jax.tree.map(jnp.copy, params) if ema else {}
    return TrainState(zero(), params, tx.init(split(params, freeze)[0]), average, zero(), zero())


def abstract_state(module, tx, ema: float, freeze: str, inputs: Inputs, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state. Call it before entering a compile-only mesh."""
    axes = logical_axes(module, inputs)

    def make():
        params = init_params(module, jax.random.key(0), inputs)
        return first_state(params, tx, ema, freeze)

    shapes = jax.eval_shape(make)
    check_divisible(shapes.params, axes, dict(mesh.shape))
    by_param = shardings(axes, mesh)
    rest = NamedSharding(mesh, P())
    opt = _like_params(shapes.opt, shapes.params, by_param, rest)
    placed = TrainState(rest, by_param, opt, by_param if ema else {}, rest, rest)
    give = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(give, shapes, placed)


def _like_params(opt, params, by_param, rest):
    """Shardings of an optimiser state: what mirrors a parameter, by path and shape, lies as it does.

    (`optax.tree.map_params` runs `init` on placeholders, which muon's matrix layout refuses.)
    """
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    known = {
        "/" + name(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(flat, jax.tree.leaves(by_param), strict=True)
    }

    def place(path, leaf):
        parts = name(path).split("/")
        for i in range(len(parts)):
            shape, sharding = known.get("/" + "/".join(parts[i:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return rest

    return jax.tree_util.tree_map_with_path(place, opt)


def in_microbatches(fn: Callable, count: int, batch: Batch, key: jax.Array) -> Any:
    """The sum of `fn(microbatch, its key)` over `count` equal parts of the batch, one at a time."""
    if count == 1:
        return fn(batch, key)
    # Rows i, i+A, i+2A... form microbatch i: every device keeps the rows it holds.
    cut = lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    micro, keys = jax.tree.map(cut, batch), jax.random.split(key, count)
    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], micro), keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total, xs):
        return jax.tree.map(jnp.add, total, fn(*xs)), None

    return jax.lax.scan(body, zeros, (micro, keys))[0]


def prepared(objective: Objective, batch: Batch, key: jax.Array) -> Batch:
    """The batch with what an objective that has `prepare(batch, key)` draws for all of its rows at once."""
    prepare = getattr(objective, "prepare", None)
    return batch if prepare is None else batch | prepare(batch, key)


def make_train_step(
    apply: Callable,
    objective: Objective,
    tx,
    *,
    accumulate: int,
    ema: float,
    seed: int,
    freeze: str = "",
    protect: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """`train_step(state, batch) -> (state, metrics)`, pure and mesh-agnostic.

    The gradient is that of sum(loss) / sum(weight) over the whole global batch, however it is cut
    into microbatches and devices. What `freeze` names gets no gradient, no optimiser state and no
    update. With `protect` the optimiser is also given the gradient that would raise the objective's
    reference. A step whose loss or gradient is not finite changes nothing but the counters. An objective
    with `refresh(params, step)` may change what is frozen before a step, and one with `prepare(batch, key)`
    adds to a batch what is drawn before it is cut.
    """
    refresh = getattr(objective, "refresh", None)
    reference = getattr(objective, "reference", None) if protect else None

    def gradient(of, params, step, batch, key):
        train, frozen = split(params, freeze)

        def loss(train):
            return of(apply, join(train, frozen), batch | {"step": step}, key)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(train)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), value, metrics

    def average_gradient(of, state, batch, key):
        grad = functools.partial(gradient, of, state.params, state.step)
        batch = prepared(of, batch, key)
        grads, loss, metrics = in_microbatches(grad, accumulate, batch, key)
        weight = metrics["loss"][1]
        return jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1), grads), loss, metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        if refresh is not None:
            state = state._replace(params=refresh(state.params, state.step))
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, loss, metrics = average_gradient(objective, state, batch, key)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)

        train, frozen = split(state.params, freeze)
        extra: dict[str, Any] = {}
        if reference is not None:
            down = average_gradient(reference, state, batch, key)[0]
            extra["reference_grads"] = jax.tree.map(jnp.negative, down)
        updates, opt = tx.update(grads, state.opt, train, **extra)
        train: Any = optax.apply_updates(train, updates)
        params, average = join(train, frozen), {}
        if ema:
            old = split(state.ema, freeze)[0]
            average = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, old, train)
            average = join(average, frozen)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
        bad = jnp.where(good, 0, 1).astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt=keep(opt, state.opt),
            ema=keep(average, state.ema),
            skipped=state.skipped + bad,
            bad_run=jnp.where(good, 0, state.bad_run + 1).astype(jnp.int32),
        )
        one = jnp.ones((), jnp.float32)
        metrics = metrics | {
            "grad_norm": (norm, one),
            "skipped": (bad.astype(jnp.float32), one),
            "bad_run": (state.bad_run.astype(jnp.float32), one),
        }
        return state, metrics

    return train_step
