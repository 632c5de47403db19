"""Kills, signals, full disks and several processes: what was saved stays, what follows is the same."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from train import trainer
from train.checkpoint import Checkpoints
from train.metrics import read, series
from train.run import load_run

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
# On this many rows and width a step takes milliseconds, so that kills fall everywhere.
SMALL = ["tiny", "steps=300", "save_every=5", "log_every=1", "eval_every=0", "--quiet"]


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_process_left():
    """Ends what a failed test leaves running."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.communicate()
    STARTED.clear()


def start(folder, *args, devices=1, log=None):
    """A training process."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "configs"]
    if log:
        env["ROW_LOG"] = str(log)
        command = [sys.executable, str(ROOT / "tests" / "worker.py")]
    given = {word.partition("=")[0] for word in args}
    defaults = [word for word in SMALL if word.partition("=")[0] not in given]
    process = subprocess.Popen(
        [*command, "train", *defaults, "--run-dir", str(folder), *args],
        env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=folder.parent,
    )  # fmt: skip
    STARTED.append(process)
    return process


def finish(process, code=0):
    """Waits; returns what it said."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def wait_for(condition, process):
    """Polls until `condition` or until the process ends."""
    while process.poll() is None and not condition():
        time.sleep(0.005)


def newest(folder):
    return max(Checkpoints(folder / "checkpoints", read_only=True).steps(), default=0)


def training(folder, least=0):
    """True once a step after `least` is recorded."""
    path = folder / "metrics.jsonl"
    return lambda: any(r["kind"] == "train" and r["step"] > least for r in read(folder)) and path


def state_of(folder, step=None):
    program = trainer.build(load_run(folder), jax.devices()[: 1 if step is None else None])
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    got = checkpoints.restore(program.state, step)
    checkpoints.close()
    assert not got.rejected
    return [np.asarray(x) for x in jax.tree.leaves(got.state)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(folder))
    return folder


def test_killed_ten_times_at_random_is_bit_identical(tmp_path, whole):
    folder, rng, reached, during = tmp_path / "run", random.Random(0), [], 0
    while len(reached) < 10:
        before = newest(folder)
        process = start(folder)
        # Wait for progress (so that ten kills are not all at the same place), then a random moment.
        goal = before + rng.randrange(5, 30)
        wait_for(lambda goal=goal: newest(folder) >= min(goal, 295), process)
        if len(reached) % 2:  # every other one while a save is being written
            wait_for(lambda: list((folder / "checkpoints").glob("*tmp*")), process)
        else:
            time.sleep(rng.random() * 0.2)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            during += bool(list((folder / "checkpoints").glob("*tmp*")))
            process.communicate()
            reached.append(newest(folder))
        else:
            finish(process)
            break
    finish(start(folder))
    print(f"checkpoints after each kill {reached}, kills during a save: {during}")
    assert len(reached) == 10 and during >= 1
    assert_same(state_of(folder), state_of(whole))
    assert series(read(folder), "train", "loss") == series(read(whole), "train", "loss")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_next_run_is_bit_identical(tmp_path, whole, number):
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(training(folder, 20), process)
    process.send_signal(number)
    finish(process, code=75)
    stop = [r for r in read(folder) if r["kind"] == "stop"][-1]
    assert stop["code"] == 75 and newest(folder) == stop["step"] < 300
    finish(start(folder))
    assert_same(state_of(folder), state_of(whole))


@contextlib.contextmanager
def small_disk(folder, size):
    """A real file system of that size."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_fills_up_while_running(tmp_path, whole):
    with small_disk(tmp_path / "disk", "12m") as disk:
        folder = disk / "run"
        said = finish(start(folder, "keep=300"), code=74)
        assert "Traceback" not in said and "last complete checkpoint is step" in said, said
        assert str(newest(folder)) in said
        run = tmp_path / "rescued"
        shutil.copytree(folder, run)
    finish(start(run))
    assert_same(state_of(run), state_of(whole))


def pair(folder, *args, log=None, each=((), ())):
    """Two processes of four devices each, with arguments for both and for `each`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = ["--coordinator", address, "--processes", "2", "--process-id"]
    return [
        start(folder, *args, *each[i], *flags, str(i), devices=4, log=log and f"{log}{i}")
        for i in range(2)
    ]


def rows_read(*logs) -> dict[tuple[int, int], str]:
    found = {}
    for log in logs:
        for line in Path(log).read_text().splitlines():
            step, row, digest = json.loads(line)
            assert found.setdefault((step, row), digest) == digest
    return found


@pytest.mark.multiprocess
def test_saved_by_two_processes_restored_by_one(tmp_path):
    args = ["steps=20", "save_every=10", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    two, one = tmp_path / "two", tmp_path / "one"
    for process in pair(two, *args, log=tmp_path / "log2."):
        finish(process)
    shutil.copytree(two, one)
    shutil.rmtree(one / "checkpoints" / "20")
    assert_same(state_of(one, 10), state_of(two, 10))
    other = ["steps=20", "save_every=10", "mesh.data=1", "mesh.fsdp=4", "mesh.context=2"]
    finish(start(one, *other, devices=8, log=tmp_path / "log1"))
    rows = [rows_read(tmp_path / "log2.0", tmp_path / "log2.1"), rows_read(tmp_path / "log1")]
    following = [{k: v for k, v in r.items() if 10 <= k[0] < 20} for r in rows]
    assert len(following[0]) == 10 * 8 and following[0] == following[1]
    # Each process read its own rows only.
    assert {k[1] for k in rows_read(tmp_path / "log2.0")} == set(range(4))
    np.testing.assert_allclose(
        series(read(one), "train", "loss")[1], series(read(two), "train", "loss")[1], atol=1e-5
    )


@pytest.mark.multiprocess
def test_what_is_wrong_on_one_process_ends_both_with_a_message(tmp_path):
    folder = tmp_path / "run"
    text = tmp_path / "text.txt"
    text.write_text("words " * 200)
    names = [(f"source.files={name}",) for name in (text, tmp_path / "missing.txt")]
    both = pair(folder, "source.seq_len=16", each=names)
    said = [finish(process, code=2) for process in both]
    assert "another process of this run found something wrong" in said[0]
    assert "nothing matches" in said[1] and not folder.exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_two_processes_fall_back_together(tmp_path, damage):
    folder = tmp_path / "run"
    args = ["steps=20", "save_every=10", "mesh.data=2", "mesh.fsdp=4"]
    for process in pair(folder, *args):
        finish(process)
    expected = state_of(folder, 20)
    files = [p for p in (folder / "checkpoints" / "20" / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 16
    largest.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    said = [finish(process) for process in pair(folder, *args)]
    assert any("step 20 set aside" in text for text in said)
    assert_same(state_of(folder, 20), expected)


@pytest.mark.multiprocess
@pytest.mark.parametrize("victim", [1, 0])
def test_a_dead_peer_ends_the_run_and_the_checkpoint_is_intact(tmp_path, victim):
    folder = tmp_path / "run"
    processes = pair(folder)
    wait_for(lambda: newest(folder) >= 10, processes[0])
    processes[victim].send_signal(signal.SIGKILL)
    processes[victim].communicate()
    other = processes[1 - victim]
    _, said = other.communicate(timeout=300)
    # Whichever comes first: the broken collective, or JAX's runtime, which then ends the process.
    assert other.returncode in (74, -signal.SIGABRT), said
    assert ("the run failed" in said) if other.returncode == 74 else ("another task died" in said)
    assert "Traceback" not in said
    steps = Checkpoints(folder / "checkpoints", read_only=True).steps()
    assert steps[-1] >= 10
    finish(start(folder, "mesh.data=1", "mesh.fsdp=8", devices=8))
    assert newest(folder) == 300


@pytest.mark.multiprocess
def test_sigterm_to_one_of_two_stops_both_at_one_step(tmp_path):
    folder = tmp_path / "run"
    processes = pair(folder, "save_every=0")
    wait_for(training(folder, 10), processes[0])
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        finish(process, code=75)
    stop = read(folder)[-1]
    assert stop["kind"] == "stop" and stop["code"] == 75 and newest(folder) == stop["step"] < 300
    assert len(Checkpoints(folder / "checkpoints", read_only=True).steps()) == 1
