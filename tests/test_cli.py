"""The command line as a user meets it: help, lists, plans, and fifty ways to get it wrong."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import presets

ROOT = Path(__file__).parent.parent


def jaxlab(*args, cwd, devices=8, timeout=120, input="", **env):
    """Runs the command in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "configs", *map(str, args)],
        cwd=cwd, input=input, capture_output=True, text=True, timeout=timeout,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices), **env},
    )  # fmt: skip


def snapshot(folder: Path) -> dict[str, str]:
    """Content of everything below."""
    return {
        str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest() if p.is_file() else ""
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a short run, damaged runs and unusable data files."""
    folder = tmp_path_factory.mktemp("place")
    done = jaxlab("train", "tiny", "steps=2", "--run-dir", "run", "--quiet", cwd=folder)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "run", folder / "unreadable")
    (folder / "unreadable" / "config.json").write_text('{"type": ')
    (folder / "busy").mkdir()
    (folder / "busy" / "thesis.tex").write_text("precious")
    (folder / "file").write_text("x")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("é".encode("latin-1") * 500)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    (folder / "data.csv").write_text("a,b\n")
    (folder / "tokenizer.json").write_text('{"nonsense": 1}')
    return folder


WRONG = [
    # the command itself
    ("no-command", "", "required: COMMAND"),
    ("unknown-command", "trian tiny", "invalid choice: 'trian'"),
    ("unknown-flag", "train tiny --stpes 3", "unrecognized arguments: --stpes"),
    ("no-config", "train", "required: config"),
    ("unknown-config", "train tinny", "did you mean tiny"),
    # fields
    ("unknown-field", "train tiny step=5", "did you mean steps"),
    ("unknown-nested", "train tiny optimizer.learning_rate=1", "unknown field 'optimizer.learn"),
    ("no-equals", "train tiny steps", "must look like field=value"),
    ("group", "train tiny optimizer=adamw", "optimizer is a group of fields"),
    ("not-an-int", "train tiny steps=many", "steps='many' is not an integer"),
    ("fraction", "train tiny steps=2.5", "steps='2.5' is not an integer"),
    ("not-a-number", "train tiny optimizer.lr=fast", "optimizer.lr='fast' is not a number"),
    ("zero-steps", "train tiny steps=0", "steps=0 must be at least 1"),
    ("negative-lr", "train tiny optimizer.lr=-1", "optimizer.lr=-1.0 must be finite and >= 0"),
    ("warmup", "train tiny optimizer.warmup=-1", "optimizer.warmup=-1 must be at least 0"),
    ("optimizer", "train tiny optimizer.name=adamm", "did you mean 'adamw'"),
    ("attention", "train tiny model.attention=flash", "not one of dense, blockwise"),
    ("dtype", "train tiny model.dtype=float8", "not one of auto, float32, bfloat16"),
    ("odd-head", "train tiny model.head_dim=15", "model.head_dim=15 must be even"),
    ("kv-heads", "train tiny model.kv_heads=3", "model.kv_heads=3 must divide model.heads=4"),
    ("tiles", "train tiny objective.tiles=5", "must divide source.seq_len=64"),
    ("index", "train tiny evaluators.7.batches=1", "is not an index below 1"),
    ("profile", "train tiny --profile 9:3", "A < B <= steps=20"),
    # meshes
    ("mesh-too-big", "train tiny mesh.data=16", "16"),
    ("mesh-odd", "train tiny mesh.tensor=3", "3"),
    ("mesh-two-wild", "train tiny mesh.fsdp=-1", "-1"),
    ("batch", "train tiny batch=12", "use a multiple of 8"),
    ("accumulate", "train tiny accumulate=3", "accumulate=3"),
    ("tensor-heads", "train tiny mesh.tensor=8", "model.heads=4 is not divisible by mesh.tensor=8"),
    ("context", "train tiny source.seq_len=68 mesh.context=8", "use a multiple of 8"),
    # data
    ("no-file", "train tiny source.files=nothing.txt", "nothing matches 'nothing.txt'"),
    ("empty-file", "train tiny source.files=empty.txt", "there is no text"),
    ("bad-utf8", "train tiny source.files=latin.txt", "latin.txt: not UTF-8 at byte 0"),
    ("bad-json", "train tiny source.files=bad.jsonl", "bad.jsonl:2: not JSON"),
    ("column", "train tiny source.files=bad.jsonl source.column=body", "source.column='body'"),
    ("suffix", "train tiny source.files=data.csv", "data.csv ends in none of"),
    ("long-rows", "train tiny source.seq_len=8000000", "use source.seq_len <= "),
    ("weights", "train tiny source.weights=1,2", "one weight for each"),
    ("packing", "train tiny source.packing=best", "must be one of"),
    ("fraction-held", "train tiny source.valid_fraction=1", "between 0 and 1"),
    ("no-tokenizer", "train tiny source.tokenizer=tok", "no file tok"),
    ("bad-tokenizer", "train tiny source.tokenizer=tokenizer.json", "not a tokenizer.json"),
    ("vocab", "train tiny model.vocab=100", "does not match source.tokenizer='bytes'"),
    # the run directory
    ("full-disk", "train tiny model.mlp=4000000000000", "MiB free, one checkpoint needs"),
    ("read-only", "train tiny --run-dir /proc/jaxlab", "/proc/jaxlab"),
    ("run-dir-file", "train tiny --run-dir file", "file"),
    ("run-dir-busy", "train tiny --run-dir busy", "not empty and holds no run"),
    ("other-config", "train tiny --run-dir run optimizer.lr=1", "optimizer.lr: 0.003 there, 1.0 now"),
    ("bad-config", "train tiny --run-dir unreadable", "cannot be read as a configuration"),
    ("allow", "train tiny --run-dir run --allow optimiser.lr", "did you mean optimizer.lr"),
    # the other commands
    ("eval-nothing", "eval nowhere", "nowhere is not a run directory"),
    ("eval-step", "eval run --step 7", "checkpoints of steps [2]"),
    ("sample-tokens", "sample run --tokens 0", "0 must be at least 1"),
    ("sample-n", "sample run --n 0", "0 must be at least 1"),
    ("sample-top-p", "sample run --top-p 1.5", "top_p=1.5 must be above 0 and at most 1"),
    ("sample-min-p", "sample run --min-p -1", "min_p=-1.0 must be from 0 to 1"),
    ("sample-stop", "sample run --stop ''", "--stop '' must not be empty"),
    ("sample-stdin", "sample run --prompt -", "the input has no lines"),
    ("sample-heat", "sample run --temperature -1", "-1.0 must be at least 0"),
    ("inspect-nothing", "inspect nowhere", "no checkpoint at nowhere"),
    ("topology", "compile --config tiny --topology v5p:2x2x9", "v5p:2x2x"),
    ("chip", "compile --config tiny --topology v9:2x2", "v9"),
    ("coordinator", "train tiny --coordinator localhost:1", "belong together"),
    ("process-id", "train tiny --coordinator h:1 --processes 2 --process-id 2", "must be in 0..1"),
    ("address", "train tiny --coordinator h --processes 2 --process-id 0", "HOST:PORT"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_invocation_says_so_and_changes_nothing(place, line, message):
    before = snapshot(place)
    done = jaxlab(*shlex.split(line), cwd=place)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, said
    assert message in said
    assert "Traceback" not in said and len(done.stderr.strip().splitlines()) < 12
    assert snapshot(place) == before


def test_full_disk_before_the_start(tmp_path):
    """A real 1 MiB file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        done = jaxlab("train", "tiny", "model.d_model=128", "--run-dir", disk / "r", cwd=tmp_path)
        assert done.returncode == 2 and "1.0 MiB free, one checkpoint needs" in done.stderr
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("command", ["", "train", "eval", "sample", "compile", "list", "inspect"])
def test_help(command, tmp_path):
    done = jaxlab(*command.split(), "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage: jaxlab" in done.stdout and "exit codes" in done.stdout


def test_list_names_every_configuration(tmp_path):
    done = jaxlab("list", cwd=tmp_path)
    assert [line.split()[0] for line in done.stdout.splitlines()] == sorted(presets())


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_configuration_plans_prints_and_lists_its_fields(name, tmp_path):
    plan = jaxlab("train", name, "--plan", cwd=tmp_path)
    assert plan.returncode == 0 and "bytes per device" in plan.stdout, plan.stderr
    fields = jaxlab("train", name, "--fields", cwd=tmp_path)
    assert "optimizer.lr" in fields.stdout
    printed = jaxlab("train", name, "--print", "optimizer.lr=0.5", cwd=tmp_path)
    assert '"lr": 0.5' in printed.stdout
    assert not list(tmp_path.iterdir())


def test_inspect_eval_and_sample_read_a_run(place):
    before = snapshot(place)
    shown = jaxlab("inspect", "run", cwd=place, devices=1).stdout
    assert "step 2 of steps [2]" in shown and "params/head" in shown and "optimizer.lr" in shown
    text = jaxlab("sample", "run", "--tokens", 5, "--prompt", "abc", cwd=place, devices=1).stdout
    assert text.startswith("abc")
    lines = dict(input="one\ntwo\n", cwd=place, devices=1)
    options = ("--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--stop", "e", "--n", 2)
    texts = jaxlab("sample", "run", "--tokens", 5, "--prompt", "-", *options, **lines).stdout
    assert texts.count("--- prompt") == 4 and "sample 2 ---\ntwo" in texts
    assert '"valid/loss"' in jaxlab("eval", "run", cwd=place, devices=2).stdout
    assert snapshot(place) == before
