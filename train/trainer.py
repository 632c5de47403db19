"""The one trainer. It knows a model, an objective, a source of batches and evaluators."""

import collections
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sharding.flops import count_flops
from sharding.mesh import make_mesh
from sharding.topology import peak_flops
from train.checkpoint import Checkpoints, check_space, state_bytes
from train.evaluate import Scene
from train.feed import Feed, abstract_batch, batch_shardings, row_shard
from train.metrics import Recorder
from train.optimizer import learning_rate, make_optimizer
from train.run import FREE, Run, difference, load_run, to_json
from train.state import TrainState, abstract_state, logical_axes, make_state, make_train_step

DONE, DIVERGED, STOPPED = 0, 3, 75


class Program(NamedTuple):
    """A run made concrete on a mesh, nothing allocated yet; `jaxlab compile` stops here."""

    run: Run
    mesh: Mesh
    apply: Callable
    step: Callable  # jitted (state, batch) -> (state, metrics)
    init: Callable  # jitted () -> state, born sharded
    state: TrainState  # abstract
    batch: dict[str, jax.ShapeDtypeStruct]


class Outcome(NamedTuple):
    """How a run ended: an exit code, the step reached and the last evaluation."""

    code: int
    step: int
    values: dict[str, Any]


def build(run: Run, devices=None) -> Program:
    """Mesh, model, optimiser and the jitted step of a checked run, from shapes alone."""
    mesh = make_mesh(run.mesh, devices)
    spec = run.source.spec(run.batch)
    module = run.model.build(mesh.devices.flat[0].platform)

    def apply(params, *args, **kwargs):
        return module.apply({"params": params}, *args, **kwargs)

    tx = make_optimizer(run.optimizer, run.steps, logical_axes(module, spec))
    ema = run.optimizer.ema
    abstract = abstract_state(module, tx, ema, spec, run.seed, mesh)
    placed = jax.tree.map(lambda a: a.sharding, abstract)
    step = make_train_step(
        apply, run.objective, tx, accumulate=run.accumulate, ema=ema, seed=run.seed
    )
    step = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(placed, batch_shardings(spec, mesh)),
        out_shardings=(placed, None),
    )
    init = jax.jit(lambda: make_state(module, tx, ema, spec, run.seed), out_shardings=placed)
    return Program(run, mesh, apply, step, init, abstract, abstract_batch(spec, mesh))


def fit(
    run: Run,
    folder: Path,
    *,
    allow: tuple[str, ...] = (),
    profile: tuple[int, int] | None = None,
    debug: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Trains `run` in `folder`, from its newest good checkpoint if it has one, to the last step."""
    run = run.check(jax.device_count())
    first = jax.process_index() == 0
    reconcile(run, folder, allow)
    if debug:
        jax.config.update("jax_debug_nans", True)

    # ---- mesh, model, data ----
    program = build(run)
    check_space(folder, state_bytes(program.state))
    rows = row_shard(program.mesh, run.batch)
    source = run.source.make(
        run.batch, seed=run.seed, split="train", process_index=rows[0], process_count=rows[1]
    )
    if first:
        write_description(run, folder)
    out = Recorder(folder, run.steps, active=first, quiet=quiet)
    checkpoints = Checkpoints(folder / "checkpoints", run.keep)

    with jax.set_mesh(program.mesh), Stop() as stop:
        # ---- restore or initialise ----
        state, start = None, 0
        if checkpoints.steps():
            got = checkpoints.restore(program.state)
            state, start = got.state, got.step
            for step, why in got.rejected.items():
                out.say(f"checkpoint step {step} set aside as unusable: {why}", "bold red")
            if got.meta.get("source") is not None:
                source.set_state(got.meta["source"][rows[0]])
            out.say(f"resumed at step {start} from {checkpoints.folder}", "green")
            out.record("resume", start, {"rejected": sorted(got.rejected)})
        else:
            state = program.init()
        scene = Scene(run, program.apply, program.mesh, rows)
        evaluators = [e.make(scene) for e in run.evaluators]
        feed = Feed(source, program.mesh, start)
        meter = Meter(program)
        source_state = getattr(source, "get_state", lambda: None)()
        saved, values, code, pending = start if start else -1, {}, DONE, collections.deque()

        def save(step: int) -> None:
            begin = time.perf_counter()
            meta = {"config": to_json(run), "source": gather_states(source_state, rows)}
            checkpoints.save(step, state, meta)
            meter.checkpoint += time.perf_counter() - begin

        def evaluate(step: int) -> dict[str, Any]:
            params = state.ema if run.optimizer.ema else state.params
            found: dict[str, Any] = {}
            for evaluator in evaluators:
                found |= evaluator(params, step)
            out.record("eval", step, found)
            out.line(step, found)
            meter.restart()
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
            pending.append((step, metrics))
            if profile and step == profile[1]:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                out.say(f"profile of steps {profile[0]} to {profile[1]}: {folder / 'profile'}")

            # Look one step back, so that the device always has a step to work on.
            evaluate_now = run.eval_every and step % run.eval_every == 0 and step < run.steps
            behind = 0 if step == run.steps or evaluate_now else 1
            while len(pending) > behind:
                at, done = pending.popleft()
                bad = meter.add(jax.device_get(done))
                out.advance(at, meter.text())
                if bad >= run.max_bad_steps:
                    code = DIVERGED
                if at % run.log_every == 0 or at == run.steps:
                    row = meter.row(at)
                    out.record("train", at, row)
                    out.line(at, row, eta=meter.eta(at))
            if code == DIVERGED:
                path = save_batch(folder, step, batch)
                out.say(
                    f"stopped at step {step}: loss or gradient not finite for {bad} steps in a row; "
                    f"the parameters are those of the last good step, the batch is in {path}",
                    "bold red",
                )
                break
            if evaluate_now:
                values = evaluate(step)
            if run.save_every and step % run.save_every == 0:
                save(step)
                saved = step
            if stop.wanted or checkpoints.preempted(step):
                code = STOPPED
                break

        # ---- end ----
        feed.close()
        if step > saved and code != DIVERGED:
            save(step)
        if code == DONE:
            values = evaluate(step)
        checkpoints.close()
        out.record("stop", step, {"code": code})
        if code == STOPPED:
            out.say(f"stopped at step {step} by a signal, saved; the same command resumes", "yellow")
        out.close()
    return Outcome(code, step, values)


class Stop:
    """Notes SIGTERM and SIGINT; a second SIGINT interrupts at once.

    With several processes SIGTERM belongs to JAX's preemption service, which makes all processes
    stop at one step; SIGINT is passed on to it.
    """

    wanted = False

    def __enter__(self):
        self._old = {}
        alone = jax.process_count() == 1
        for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
            try:
                self._old[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: the caller handles signals
                break
        return self

    def _note(self, number, frame):
        if number == signal.SIGINT:
            if self.wanted:
                raise KeyboardInterrupt
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        self.wanted = jax.process_count() == 1

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Meter:
    """Time and token accounting between log records."""

    def __init__(self, program: Program):
        run, batch = program.run, program.batch
        self.run, self.tokens = run, int(np.prod(batch["tokens"].shape)) if "tokens" in batch else 0
        self.lr = learning_rate(run.optimizer, run.steps)
        self.forward_flops = forward_flops(program)
        device = program.mesh.devices.flat[0]
        peak = peak_flops(device.device_kind, str(getattr(run.model, "dtype", "auto")))
        self.peak = peak * program.mesh.size if peak else None
        self.device = device
        self.last_loss, self.rate = float("nan"), 0.0
        self.restart()

    def restart(self) -> None:
        """Starts a new interval."""
        self.data_wait = self.checkpoint = 0.0
        self.sums: dict[str, np.ndarray] = {}
        self.count, self.begin = 0, time.perf_counter()

    def add(self, metrics: dict[str, Any]) -> int:
        """Adds a step's (sum, weight) pairs; returns how many bad steps there were in a row."""
        bad_run = int(metrics.pop("bad_run")[0])
        if not bad_run:
            for name, pair in metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + np.asarray(pair, np.float64)
            loss, weight = metrics["loss"]
            self.last_loss = float(loss) / max(float(weight), 1e-30)
        else:
            pair = np.asarray(metrics["skipped"], np.float64)
            self.sums["skipped"] = self.sums.get("skipped", 0.0) + pair
        self.count += 1
        spent = time.perf_counter() - self.begin
        self.rate = self.count * self.tokens / spent
        return bad_run

    def text(self) -> str:
        """For the progress bar."""
        return f"loss {self.last_loss:.4f}  {self.rate:,.0f} tok/s"

    def eta(self, step: int) -> float:
        """Seconds left at the present rate."""
        spent = time.perf_counter() - self.begin
        return (self.run.steps - step) * spent / max(self.count, 1)

    def row(self, step: int) -> dict[str, float]:
        """The record of the interval, and a new interval."""
        spent, count = time.perf_counter() - self.begin, max(self.count, 1)
        row = {name: float(s / max(w, 1e-30)) for name, (s, w) in self.sums.items()}
        row |= {
            "lr": float(self.lr(step - 1)),
            "tokens": step * self.tokens,
            "tokens_per_second": count * self.tokens / spent,
            "step_seconds": (spent - self.data_wait - self.checkpoint) / count,
            "data_wait": self.data_wait / spent,
            "checkpoint": self.checkpoint / spent,
            "flops_per_second": 3 * self.forward_flops * count / spent,
        }
        if self.peak:
            row["mfu"] = row["flops_per_second"] / self.peak
        memory = self.device.memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            row["device_peak_bytes"] = memory["peak_bytes_in_use"]
        begin = self.begin
        self.restart()
        self.begin = max(begin + spent, begin)
        return row


def forward_flops(program: Program) -> float:
    """Counted FLOPs of the objective's forward pass; a step is three times that (no recomputation)."""
    params, key = program.state.params, jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    bare = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)  # noqa: E731
    loss = lambda p, b, k: program.run.objective(program.apply, p, b, k)[0]  # noqa: E731
    return count_flops(loss, bare(params), bare(program.batch), key)


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


def reconcile(run: Run, folder: Path, allow: tuple[str, ...]) -> None:
    """ValueError, with the difference, when `folder` holds a run that learns something else."""
    if not (folder / "config.json").is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty and holds no run: give another --run-dir, nothing was touched"
            )
        return
    changed = difference(load_run(folder), run)
    fixed = [c for c in changed if not c[0].startswith((*FREE, *allow))]
    if fixed:
        lines = "\n".join(f"  {path}: {old!r} there, {new!r} now" for path, old, new in fixed[:20])
        raise ValueError(
            f"{folder} holds a run with another configuration:\n{lines}\n"
            f"use another --run-dir, --fresh to set that run aside, or --allow FIELD to go on with it"
        )


def write_description(run: Run, folder: Path) -> None:
    """config.json and versions.json; an earlier config.json is kept in the list of versions."""
    folder.mkdir(parents=True, exist_ok=True)
    from importlib.metadata import version

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": commit.stdout.strip() or None,
        "dirty": bool(dirty.stdout.strip()),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "command": sys.argv,
    }
    path = folder / "versions.json"
    history = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps([*history, entry], indent=1) + "\n")
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(to_json(run), indent=1) + "\n")
    temporary.replace(folder / "config.json")


def save_batch(folder: Path, step: int, batch: dict[str, jax.Array]) -> Path:
    """Writes the rows held by this process to an .npz for inspection."""
    path = folder / f"bad-batch-step{step}-process{jax.process_index()}.npz"
    local = {k: np.concatenate([np.asarray(s.data) for s in v.addressable_shards if s.replica_id == 0] or [np.zeros(0)]) for k, v in batch.items()}  # fmt: skip  # noqa: E501
    np.savez(path, **local)
    return path


