"""The command line as a user meets it: help, lists, plans, and eighty ways to get it wrong."""

import dataclasses
import hashlib
import importlib
import io
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import __main__ as entry
from configs import presets
from models.hf_names import hf_config
from sharding.mesh import MeshShape
from train.arguments import parse
from train.checkpoint import Checkpoints
from train.cli import Preset, main
from train.devices import quiet_libtpu
from train.errors import RunFailed
from train.folders import mesh_here
from train.metrics import plot_loss
from train.overrides import override
from train.report import program_name, summary
from train.run import FREE, load_run, within
from train.trainer import Outcome, build

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
    made = jaxlab("export", "hf", "run", "good", cwd=folder)
    assert made.returncode == 0, made.stderr
    shutil.copytree(folder / "run", folder / "unreadable")
    (folder / "unreadable" / "config.json").write_text('{"type": ')
    (folder / "busy").mkdir()
    (folder / "busy" / "thesis.tex").write_text("precious")
    (folder / "file").write_text("x")
    for name, kind in (("model", "Llama"), ("mistral", "Mistral")):
        (folder / name).mkdir()
        shape = hf_config(presets()["tiny"].make().model, "float32", 64)
        shape["architectures"] = [f"{kind}ForCausalLM"]
        (folder / name / "config.json").write_text(json.dumps(shape))
        (folder / name / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("é".encode("latin-1") * 500)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    (folder / "data.csv").write_text("a,b\n")
    (folder / "tokenizer.json").write_text('{"nonsense": 1}')
    shutil.copytree(folder / "run", folder / "lost")
    (folder / "lost" / "config.json").unlink()
    shutil.copytree(folder / "run", folder / "rotten")
    for file in (folder / "rotten" / "checkpoints" / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"rot")
    shutil.copytree(folder / "run", folder / "bad-meta")
    (folder / "bad-meta" / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
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
    ("attention", "train tiny model.context.core=flash", "not one of auto, dense, blockwise"),
    ("dtype", "train tiny model.dtype=float8", "not one of auto, float32, bfloat16"),
    ("odd-head", "train tiny model.head_dim=15", "model.head_dim=15 must be even"),
    ("kv-heads", "train tiny model.kv_heads=3", "model.kv_heads=3 must divide model.heads=4"),
    ("tiles", "train tiny objective.tiles=5", "must divide source.seq_len=64"),
    ("index", "train tiny evaluators.7.batches=1", "is not an index below 1"),
    ("profile", "train tiny --profile 9:3", "A < B <= steps=20"),
    ("twice", "train tiny steps=5 steps=6", "steps is given twice: steps=5 and steps=6"),
    ("no-group", "train tiny d_modle=3", "did you mean model.d_model"),
    ("infinite", "train tiny optimizer.lr=inf", "optimizer.lr=inf must be finite"),
    ("seed", "train tiny seed=-1", "seed=-1 must be at least 0"),
    ("epsilon", "train tiny model.norm_eps=0", "model.norm_eps=0.0 must be finite and above 0"),
    ("rope", "train tiny model.rope_theta=1", "model.rope_theta=1.0 must be finite and above 1"),
    ("z-loss", "train tiny objective.z_loss=-1", "objective.z_loss=-1.0 must be finite and >= 0"),
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
    ("packing", "train tiny source.packing=best", "is not one of concat, first_fit"),
    ("fraction-held", "train tiny source.valid_fraction=1", "between 0 and 1"),
    ("no-tokenizer", "train tiny source.tokenizer=tok", "no file tok"),
    ("bad-tokenizer", "train tiny source.tokenizer=tokenizer.json", "not a tokenizer.json"),
    ("vocab", "train tiny model.vocab=100", "does not match source.tokenizer='bytes'"),
    # the run directory
    ("full-disk", "train tiny model.mlp=4000000000000", "MiB free, one checkpoint needs"),
    ("read-only", "train tiny --run-dir /proc/jaxlab", "--run-dir /proc/jaxlab: /proc cannot be written"),
    ("cache", "train tiny source.cache_dir=/proc/x", "source.cache_dir='/proc/x': cannot write in /proc/x"),
    ("run-dir-file", "train tiny --run-dir file", "--run-dir file: file is a file, not a folder"),
    ("run-dir-below", "train tiny --run-dir file/a", "--run-dir file/a: file is a file, not a"),
    ("run-dir-empty", "train tiny --run-dir ''", "argument --run-dir: '' must not be empty"),
    ("run-dir-busy", "train tiny --run-dir busy", "not empty and holds no run"),
    ("other-config", "train tiny --run-dir run optimizer.lr=1", "optimizer.lr: 0.003 there, 1.0 now"),
    ("bad-config", "train tiny --run-dir unreadable", "unreadable/config.json cannot be read"),
    ("lost-config", "train tiny --run-dir lost", "lost has checkpoints but no config.json: put it"),
    ("allow", "train tiny --run-dir run --allow optimiser.lr", "did you mean optimizer.lr"),
    ("allow-nosuch", "train tiny --allow nosuch", "--allow nosuch: there is no such field"),
    # the other commands
    ("eval-nothing", "eval nowhere", "nowhere is not a run directory"),
    ("eval-step", "eval run --step 7", "checkpoints of steps [2]"),
    ("eval-field", "eval run steps=5", "steps means nothing to `jaxlab eval`"),
    ("eval-rotten", "eval rotten", "put one back from a copy"),
    ("sample-word", "sample run --tokens abc", "argument --tokens: 'abc' is not an integer"),
    ("sample-long", "sample run --tokens 5000000", "--tokens: 5000000 must be at most 100000"),
    ("sample-tokens", "sample run --tokens 0", "0 must be at least 1"),
    ("sample-n", "sample run --n 0", "0 must be at least 1"),
    ("sample-top-p", "sample run --top-p 1.5", "top_p=1.5 must be above 0 and at most 1"),
    ("sample-min-p", "sample run --min-p -1", "min_p=-1.0 must be from 0 to 1"),
    ("sample-stop", "sample run --stop ''", "--stop '' must not be empty"),
    ("sample-stdin", "sample run --prompt -", "the input has no lines"),
    ("sample-heat", "sample run --temperature -1", "-1.0 must be finite and at least 0"),
    ("inspect-nothing", "inspect nowhere", "no checkpoint at nowhere"),
    ("inspect-file", "inspect file", "file is a file, not a run directory"),
    ("inspect-meta", "inspect bad-meta", "bad-meta/checkpoints/2 is damaged"),
    ("inspect-rotten", "inspect rotten --verify", "rotten/checkpoints/2 is damaged"),
    ("import-nothing", "import hf nowhere --run-dir new", "nowhere"),
    ("import-empty", "import hf busy --run-dir new", "it has no config.json"),
    ("import-busy", "import hf model --run-dir busy", "is not empty"),
    ("import-mistral", "import hf mistral --run-dir new", "architectures="),
    ("import-rank", "import hf model --run-dir new --lora 0", "0 must be at least 1"),
    ("import-field", "import hf good --run-dir new model.layers=9 source.tokenizer=bytes",
     "is not the imported model's"),
    ("import-adapter", "import hf good --run-dir new --adapter busy", "adapter_config.json"),
    ("import-tokenizer", "import hf good", "no tokenizer.json: give source.tokenizer=FILE"),
    ("import-both", "import hf good --lora 2 --adapter busy", "not allowed with argument --lora"),
    ("export-merge", "export hf run out --merge", "run has no adapter to merge"),
    ("export-hf", "export hf good out", "jaxlab import hf good"),
    ("import-format", "import gguf model --run-dir new", "invalid choice: 'gguf'"),
    ("export-nothing", "export hf nowhere out", "nowhere"),
    ("export-step", "export hf run/checkpoints/7 out", "checkpoints of steps [2]"),
    ("export-busy", "export hf run busy", "is not empty"),
    ("export-dtype", "export hf run out --dtype int4", "invalid choice: 'int4'"),
    ("topology", "compile --config tiny --topology v5p:2x2x9", "v5p:2x2x"),
    ("chip", "compile --config tiny --topology v9:2x2", "v9"),
    ("sweep", "compile --config tiny --topology v5e:2x4 --sweep seed", "must be FIELD=VALUE"),
    ("coordinator", "train tiny --coordinator localhost:1", "belong together"),
    ("process-id", "train tiny --coordinator h:1 --processes 2 --process-id 2", "must be in 0..1"),
    ("address", "train tiny --coordinator h --processes 2 --process-id 0", "HOST:PORT"),
]  # fmt: skip


WRONG_LINES = pytest.mark.parametrize(
    ("line", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)


def check_wrong(code, stderr, message):
    said = " ".join(stderr.split())
    assert code == 2, said
    assert message in said
    assert "Traceback" not in said and len(stderr.strip().splitlines()) < 12


@WRONG_LINES
def test_wrong_invocation_says_so_and_changes_nothing(place, monkeypatch, capfd, line, message):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    before = snapshot(place)
    try:
        code = main(presets(), shlex.split(line))
    except SystemExit as exit_:  # argparse
        code = exit_.code
    check_wrong(code, capfd.readouterr().err, message)
    assert snapshot(place) == before


@pytest.fixture(scope="module")
def durations():
    """Seconds of each wrong invocation; the slowest is printed at the end."""
    seconds: dict[str, float] = {}
    yield seconds
    slowest = max(seconds, key=lambda line: seconds[line])
    print(f"slowest of {len(seconds)} wrong invocations: {seconds[slowest]:.1f} s, {slowest}")


@pytest.mark.slow
@WRONG_LINES
def test_wrong_invocation_in_a_process_of_its_own(place, durations, line, message):
    before = snapshot(place)
    begin = time.perf_counter()
    done = jaxlab(*shlex.split(line), cwd=place)
    durations[line] = time.perf_counter() - begin
    check_wrong(done.returncode, done.stderr, message)
    assert snapshot(place) == before


def test_a_platform_that_is_not_here(tmp_path):
    done = jaxlab("train", "tiny", cwd=tmp_path, JAX_PLATFORMS="rocm")
    assert done.returncode == 2, done.stderr
    assert "jaxlab: no device to run on, JAX_PLATFORMS='rocm'" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


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
def test_every_configuration_plans_prints_and_lists_its_fields(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def said(*words) -> str:
        assert main(presets(), ["train", name, *words]) == 0
        return capsys.readouterr().out

    assert "bytes per device" in said("--plan")
    assert '"lr": 0.5' in said("--print", "optimizer.lr=0.5")
    fields = said("--fields")
    assert "optimizer.lr" in fields
    lines = fields.splitlines()
    assert all(line.count("  ") and line[0] != " " for line in lines)
    packing = [line for line in lines if line.startswith("source.packing ")]
    assert all("concat|first_fit" in line for line in packing)
    assert not list(tmp_path.iterdir())


def test_inspect_eval_and_sample_read_a_run(place):
    before = snapshot(place)
    shown = jaxlab("inspect", "run", cwd=place, devices=1).stdout
    assert "step 2 of steps [2]" in shown and "params/head" in shown and "optimizer.lr" in shown
    assert "checksums were not compared" in shown
    whole = jaxlab("inspect", "run/checkpoints", "--verify", cwd=place, devices=1).stdout
    assert "all its checksums are right" in whole
    text = jaxlab("sample", "run", "--tokens", 5, "--prompt", "abc", cwd=place, devices=1).stdout
    assert text.startswith("abc")
    lines = dict(input="one\ntwo\n", cwd=place, devices=1)
    options = ("--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--stop", "e", "--n", 2)
    texts = jaxlab("sample", "run", "--tokens", 5, "--prompt", "-", *options, **lines).stdout
    assert texts.count("--- prompt") == 4 and "sample 2 ---\ntwo" in texts
    # A run of eight devices: on two it falls back to one, on eight its own mesh is used.
    for devices in (2, 8):
        fields = ("batch=8", "evaluators.0.batches=1", "model.context.core=dense")
        assert '"valid/loss"' in jaxlab("eval", "run", *fields, cwd=place, devices=devices).stdout
    assert snapshot(place) == before


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A source without text."""

    size: int = 3


def typed(run, folder, config, assignments):
    """Arguments of the commands that the summary proposes, as a shell would split them."""
    text = summary(run, folder, config, assignments, Outcome(0, 20, {}), 1.0)
    lines = text.split("next\n")[1].splitlines()
    return [shlex.split(line) for line in lines]


def test_what_to_try_next_can_be_typed(tmp_path, monkeypatch):
    program = tmp_path / "bin dir" / "jaxlab"
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.chdir(tmp_path)
    run = override(presets()["demo"].make(), ["steps=20", "evaluators.0.batches=8"])
    folder = Path("my runs/é")
    commands = typed(run, folder, "demo", ["source.files=a b.txt", "steps=20"])
    assert all(words[0] == "bin dir/jaxlab" for words in commands)
    parsed = [parse(words[1:]) for words in commands]
    assert [args.command for args in parsed] == ["sample", "eval", "train", "list"]
    assert parsed[0].run == parsed[1].run == folder
    assert parsed[1].overrides == ["evaluators.0.batches=0"]
    assert parsed[2].overrides == ["source.files=a b.txt", "steps=60"]
    assert parsed[2].run_dir == Path("my runs/é-longer")

    silent = dataclasses.replace(run, evaluators=(), source=Pictures())
    assert [words[1] for words in typed(silent, folder, "demo", [])] == ["train", "list"]
    sample_only = dataclasses.replace(run, evaluators=run.evaluators[1:])
    assert typed(sample_only, folder, "demo", [])[1][1:] == ["eval", "my runs/é"]


def test_large_pages_are_asked_for_once(monkeypatch):
    """The process starts anew with the allocator's setting, unless the user has made one."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda *args: calls.append(args) or sys.exit(0))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "configs", "list"])
    monkeypatch.setattr(sys, "argv", ["jaxlab", "list"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    with pytest.raises(SystemExit):
        entry.main()
    assert calls == [(sys.executable, [sys.executable, "-m", "configs", "list"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert entry.main() == 0 and len(calls) == 1
    monkeypatch.delenv("GLIBC_TUNABLES")


def test_the_program_is_named_as_it_was_called(tmp_path, monkeypatch):
    program = tmp_path / "jaxlab"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert program_name() == str(program)
    monkeypatch.chdir(tmp_path)
    assert program_name() == "./jaxlab"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program_name() == "jaxlab"
    monkeypatch.setattr(sys, "argv", ["/a/configs/__main__.py"])
    assert program_name().endswith(" -m configs")


def test_a_preset_without_documentation_is_listed(capsys):
    assert main({"bare": Preset("bare", "", lambda: None)}, ["list"]) == 0
    assert capsys.readouterr().out.split()[0] == "bare"


class Command:
    """Stands for a configuration whose making fails as the given error does."""

    def __init__(self, error):
        self.error = error

    def __call__(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RunFailed("the run failed: disk"), 74, "jaxlab: the run failed: disk"),
        (RuntimeError("INTERNAL: broken\nmore"), 74, "train failed: INTERNAL: broken (--debug"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 74, "out of memory: smaller batch"),
        (KeyboardInterrupt(), 130, "interrupted; the newest checkpoint stays"),
    ],
)
def test_failures_take_one_line(error, code, said, capsys):
    got = main({"x": Preset("x", "", Command(error))}, ["train", "x"])
    err = capsys.readouterr().err
    assert got == code and said in err and len(err.splitlines()) == 1
    main({"x": Preset("x", "", Command(error))}, ["train", "x", "--debug"])
    traced = "Traceback" in capsys.readouterr().err
    assert traced == (code == 74)


def test_arguments_that_do_not_parse_take_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["sample", "run", "--n", "x"])
    line = "jaxlab: argument --n: 'x' is not an integer (jaxlab sample --help)\n"
    assert caught.value.code == 2 and capsys.readouterr().err == line


def test_tpus_are_not_looked_for_only_where_nothing_else_is(tmp_path, monkeypatch):
    (tmp_path / "libtpu.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    quiet_libtpu()
    assert os.environ.pop("JAX_PLATFORMS") == "cpu"
    (tmp_path / "jax_plugins" / "xla_rocm7").mkdir(parents=True)
    importlib.invalidate_caches()
    quiet_libtpu()
    assert "JAX_PLATFORMS" not in os.environ


def test_fields_are_compared_by_component():
    assert within("model.dtype", FREE) and within("mesh.data", FREE)
    assert not within("model.dtype_x", FREE) and not within("meshes.data", FREE)


def test_eval_takes_the_mesh_of_the_run_where_it_fits():
    own = MeshShape(data=2, fsdp=2)
    assert mesh_here(own, devices=4, processes=1) == own
    assert mesh_here(own, devices=8, processes=1) == own
    assert mesh_here(own, devices=2, processes=1) == MeshShape(data=1)
    assert mesh_here(own, devices=8, processes=2) == MeshShape(data=-1)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_eval_by_two_processes_is_eval_by_one(place):
    """The run was of eight devices; the four there are share its rows."""
    with socket.socket() as held:
        held.bind(("", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
    fields = ("evaluators.0.batches=1",)
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(
                jaxlab, "eval", "run", *fields, "--coordinator", address, "--processes", 2,
                "--process-id", i, cwd=place, devices=2,
            )
            for i in range(2)
        ]  # fmt: skip
        first, second = (process.result() for process in both)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    one = jaxlab("eval", "run", *fields, cwd=place, devices=1).stdout
    # The collectives of the CPU print lines of their own.
    assert '"valid/loss"' not in second.stdout
    found = json.loads(first.stdout[first.stdout.index("{\n") :])
    assert found == pytest.approx(json.loads(one), abs=1e-5)


def test_only_the_parameters_are_read(place):
    """Equal to those of the whole state, placed as asked."""
    run = load_run(place / "run")
    program = build(dataclasses.replace(run, mesh=MeshShape(data=2, fsdp=4)).check(8))
    checkpoints = Checkpoints(place / "run" / "checkpoints", read_only=True)
    whole = checkpoints.restore(program.state).state.params
    params = checkpoints.restore(program.state, only="params").state
    checkpoints.close()
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True):
        assert a.sharding == b.sharding and np.array_equal(a, b)


def test_plot_of_a_folder_with_a_name_in_other_letters(tmp_path):
    folder = tmp_path / "実験$x^$"
    folder.mkdir()
    row = {"kind": "train", "step": 1, "loss": 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_loss(folder).stat().st_size > 0
