"""The one trainer. It knows a model, an objective, a source of batches and evaluators."""

import collections
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sharding.mesh import make_mesh
from train.checkpoint import Checkpoints, Restored, check_space, state_bytes
from train.evaluate import Scene
from train.feed import Feed, abstract_batch, batch_shardings, row_shard, token_order
from train.folders import starting_parameters, starting_run
from train.meter import Meter
from train.metrics import Recorder
from train.optimizer import make_optimizer, split
from train.processes import all_or_none
from train.run import Run, described
from train.rundir import (
    begins,
    claimed,
    failures,
    reconcile,
    refuse_random,
    save_batch,
    write_description,
)
from train.signals import Stop
from train.state import (
    TrainState,
    abstract_state,
    first_state,
    init_params,
    logical_axes,
    make_train_step,
)

DONE, DIVERGED, STOPPED = 0, 3, 75


class Program(NamedTuple):
    """A run made concrete on a mesh, nothing allocated yet; `jaxlab compile` stops here."""

    run: Run
    mesh: Mesh
    apply: Callable
    step: Callable  # jitted (state, batch) -> (state, metrics)
    init: Callable  # jitted () -> state, born sharded
    warm: Callable  # jitted parameters -> state before the first step
    state: TrainState  # abstract
    batch: dict[str, jax.ShapeDtypeStruct]
    order: np.ndarray | None  # of the tokens of a row, None: as the source has them


class Outcome(NamedTuple):
    """How a run ended: an exit code, the step reached and the last evaluation."""

    code: int
    step: int
    values: dict[str, Any]


def build(run: Run, devices=None) -> Program:
    """Mesh, model, optimiser and the jitted step of a checked run, from shapes alone."""
    mesh = make_mesh(run.mesh, devices)
    spec = run.source.spec(run.batch)
    inputs = run.model.inputs(spec)
    platform = mesh.devices.flat[0].platform
    order = token_order(run.model, spec, dict(mesh.shape), platform)
    module = run.model.build(platform)

    def apply(params, *args, **kwargs):
        return module.apply({"params": params}, *args, **kwargs)

    ema, freeze = run.optimizer.ema, run.optimizer.freeze
    tx = make_optimizer(run.optimizer, run.steps, split(logical_axes(module, inputs), freeze)[0])
    abstract = abstract_state(module, tx, ema, freeze, inputs, mesh)
    placed = jax.tree.map(lambda a: a.sharding, abstract)
    step = make_train_step(
        apply,
        run.objective,
        tx,
        accumulate=run.accumulate,
        ema=ema,
        seed=run.seed,
        freeze=freeze,
        protect=bool(run.optimizer.protect),
    )
    step = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(placed, batch_shardings(spec, mesh)),
        out_shardings=(placed, None),
    )

    def first(params):
        return first_state(params, tx, ema, freeze)

    def born():
        return first(init_params(module, jax.random.key(run.seed), inputs))

    init = jax.jit(born, out_shardings=placed)
    warm = jax.jit(first, donate_argnums=0, out_shardings=placed)
    batch = abstract_batch(spec, mesh)
    return Program(run, mesh, apply, step, init, warm, abstract, batch, order)


def restore(program: Program, checkpoints: Checkpoints, step: int | None = None) -> Restored:
    """The newest (or given) checkpoint as a train state; one of parameters only starts a run."""
    got = checkpoints.restore(program.state, step)
    if isinstance(got.state, dict):
        got.state = program.warm(got.state["params"])
    return got


def fit(
    run: Run,
    folder: Path,
    *,
    allow: tuple[str, ...] = (),
    fresh: bool = False,
    profile: tuple[int, int] | None = None,
    debug: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Trains `run` in `folder`, from its newest good checkpoint if it has one, to the last step.

    `fresh` sets an earlier run in `folder` aside; `allow` names fields that may differ from its.
    ValueError or OSError, with nothing changed, for what cannot work; RunFailed later on.
    """
    first = jax.process_index() == 0

    with contextlib.ExitStack() as stack:
        # ---- mesh, model, data: everything that can be wrong is found out before a file is touched
        with all_or_none():
            run = run.check(jax.device_count())
            refuse_random(run, folder, fresh)
            if not fresh:
                reconcile(run, folder, allow)
            if run.start and begins(folder, fresh):
                starting_run(run)
            program = build(run)
            check_space(folder, state_bytes(program.state))
            rows = row_shard(program.mesh, run.batch)
            source = run.source.make(
                run.batch, seed=run.seed, split="train",
                process_index=rows[0], process_count=rows[1] or 1,
            )  # fmt: skip
            if hasattr(source, "__next__") and not rows[1]:
                raise ValueError(
                    "a stream needs the rows of a process in one piece: use another mesh, or a "
                    "source whose batch is a function of the step (source.packing=concat)"
                )
            scene = Scene(run, program.apply, program.mesh, rows, program.order)
            if hasattr(source, "attach"):
                source.attach(scene)
            evaluators = [e.make(scene) for e in run.evaluators]
        with all_or_none():
            if first:
                stack.enter_context(claimed(folder, fresh))
        checkpoints = Checkpoints(folder / "checkpoints", run.keep)
        stack.enter_context(jax.set_mesh(program.mesh))
        stack.enter_context(jax.debug_nans(debug))

        # ---- restore or initialise ----
        start, rejected = 0, {}
        state: Any = None
        if checkpoints.steps():
            got = restore(program, checkpoints)
            state, start, rejected = got.state, got.step, got.rejected
            if got.meta.get("source") is not None:
                if len(got.meta["source"]) != rows[1]:
                    raise ValueError(
                        f"the stream was saved by {len(got.meta['source'])} row shards and cannot "
                        f"go on with {rows[1]}: use as many processes"
                    )
                source.set_state(got.meta["source"][rows[0]])
        if first:
            write_description(run, folder)
        out = stack.enter_context(
            contextlib.closing(Recorder(folder, run.steps, active=first, quiet=quiet))
        )
        stack.enter_context(failures(folder, checkpoints))
        stop = stack.enter_context(Stop())
        for step, why in rejected.items():
            out.warn(f"checkpoint step {step} set aside as unusable: {why}")
        if state is None:
            state = program.warm(starting_parameters(run)) if run.start else program.init()
        else:
            out.say(f"resumed at step {start} from {checkpoints.folder}", "green")
        out.record("resume" if start else "start", start, {})
        feed = stack.enter_context(
            contextlib.closing(Feed(source, program.mesh, start, order=program.order))
        )
        meter = Meter(program)
        source_state = getattr(source, "get_state", lambda: None)()
        saved, values, code, pending = start if start else -1, {}, DONE, collections.deque()

        def save(step: int) -> None:
            begin = time.perf_counter()
            meta = {"config": described(run, folder), "source": gather_states(source_state, rows)}
            checkpoints.save(step, state, meta)
            meter.checkpoint += time.perf_counter() - begin

        def evaluate(step: int) -> dict[str, Any]:
            begin = time.perf_counter()
            params = state.ema if run.optimizer.ema else state.params
            found: dict[str, Any] = {}
            for evaluator in evaluators:
                found |= evaluator(params, step)
            out.record("eval", step, found)
            out.line(step, found)
            meter.leave_out(time.perf_counter() - begin)
            return found

        # ---- loop ----
        step = start
        if step == 0 and evaluators and run.eval_every:
            values = evaluate(0)
        meter.restart()
        while step < run.steps:
            begin = time.perf_counter()
            batch, source_state = feed.take(state.params)
            meter.data_wait += time.perf_counter() - begin
            if profile and step == profile[0]:
                jax.profiler.start_trace(str(folder / "profile"))
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = program.step(state, batch)
            step += 1
            pending.append((step, metrics, batch))
            if profile and step == profile[1]:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                out.say(f"profile of steps {profile[0]} to {profile[1]}: {folder / 'profile'}")

            # Look one step back, so that the device always has a step to work on.
            evaluate_now = run.eval_every and step % run.eval_every == 0 and step < run.steps
            stopping = stop.wanted or checkpoints.preempted(step)
            behind = 0 if step == run.steps or evaluate_now or stopping else 1
            while len(pending) > behind and code != DIVERGED:
                at, done, used = pending.popleft()
                bad = meter.add(jax.device_get(done))
                out.advance(at, meter.text())
                if bad >= run.max_bad_steps:
                    code = DIVERGED
                    path = save_batch(folder, at, used)
                    out.warn(
                        f"stopped at step {at}: loss or gradient not finite for {bad} steps in a "
                        f"row; they changed no parameter; the batch is in {path}"
                    )
                if at % run.log_every == 0 or at == run.steps:
                    row = meter.row(at)
                    out.record("train", at, row)
                    out.line(at, row, eta=meter.eta(at))
            if code == DIVERGED:
                break
            if evaluate_now:
                values = evaluate(step)
            if run.save_every and step % run.save_every == 0:
                save(step)
                saved = step
            if stopping:
                code = STOPPED
                break

        # ---- end ----
        if step > saved and code != DIVERGED:
            save(step)
        if code == DONE:
            values = evaluate(step)
        checkpoints.close()
        out.record("stop", step, {"code": code})
        if code == STOPPED:
            out.say(
                f"stopped at step {step} by a signal, saved; the same command resumes", "yellow"
            )
    return Outcome(code, step, values)


def gather_states(state: Any, rows: tuple[int, int]) -> list[Any] | None:
    """The source state of every row shard, in order, on every process; None for pure sources."""
    if state is None:
        return None
    if jax.process_count() == 1:
        return [state]
    text = json.dumps([rows[0], state]).encode()
    size = int(np.max(multihost_utils.process_allgather(np.asarray(len(text)))))
    padded = np.frombuffer(text.ljust(size), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    found = dict(json.loads(bytes(row).decode()) for row in gathered)
    return [found[i] for i in range(rows[1])]
