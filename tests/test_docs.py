"""What README and docs show is run: Python blocks as they stand, commands on small runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import presets
from models.decoder import DecoderConfig
from tests.test_exchange import tokenizer
from tests.test_hf import write
from train.cli import parse, resolve
from train.run import flatten

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Put in the place of what the commands that train say, so that a page takes seconds.
SMALL = ["steps=2", "batch=8", "eval_every=0", "model.layers=1", "source.seq_len=32"]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page: Path) -> list[list[str]]:
    """Arguments of every `jaxlab` line of the page's sh blocks, comments left out."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words and words[0] == "jaxlab"]


def hugging_face_folder(folder: Path) -> None:
    """DIR, a model of one layer with a tokenizer, and my.jsonl: what a page's commands start from."""
    config = DecoderConfig(
        layers=1, d_model=32, heads=2, kv_heads=1, head_dim=16, mlp=48, qk_norm=True
    )
    write(folder / "DIR", config)
    tokenizer(folder / "DIR", 256)
    text = json.dumps({"text": " ".join(chr(0x4E00 + i) for i in range(1, 100))})
    (folder / "my.jsonl").write_text("\n".join([text] * 20))


def labelled(folder: Path) -> None:
    """photos, images of two classes, and rows.parquet."""
    from PIL import Image

    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    columns = {f"x{i}": random.normal(size=40) for i in range(3)}
    pq.write_table(pa.table(columns | {"label": np.arange(40) % 2}), folder / "rows.parquet")


def run(arguments, cwd, input="", **env):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, input=input,
        env=os.environ | {"PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_from_top_to_bottom(page, tmp_path):
    (tmp_path / "page.py").write_text("\n\n".join(blocks(page, "python")))
    # Most of the time is compilation.
    done = run(["page.py"], tmp_path, XLA_FLAGS="--xla_backend_optimization_level=0")
    assert done.returncode == 0, done.stderr


# All commands of a page in one process, which pays once for its imports; stops at the first that fails.
DRIVER = """
import contextlib, io, json, sys
from configs import presets
from train.cli import main
for words in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(presets(), words)
    if code or not said.getvalue():
        sys.exit(f"{words} ended with {code} and wrote {said.getvalue()!r}")
"""


# Pages whose commands train larger models.
LONG = ("ttt.md", "context.md", "generation.md", "diffusion.md", "uncertainty.md")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=pytest.mark.slow if p.name in LONG else (), id=p.name)
        for p in PAGES
        if commands(p)
    ],
)
def test_commands_do_what_they_say(page, tmp_path):
    """In order, in one folder; `make demo` has run before, on a small model."""
    hugging_face_folder(tmp_path)
    labelled(tmp_path)
    lines = [["train", "demo", *SMALL]]
    for words in commands(page):
        args = parse(words)
        if args.command == "compile":  # run by test_plan.py, where libtpu is installed
            resolve(presets(), args.config, args.overrides)
            continue
        trains = args.command == "train" and not (args.plan or args.fields)
        if trains or args.command == "import":
            named = trains and args.config in presets()  # else the model is there already
            small = [field for field in SMALL if named or not field.startswith("model.")]
            if named:  # a classifier has no sequences
                known = flatten(resolve(presets(), args.config, []))
                small = [field for field in small if field.partition("=")[0] in known]
            set_here = {field.partition("=")[0] for field in small}
            words = [*(w for w in words if w.partition("=")[0] not in set_here), *small]
        lines.append(words)
    if len(lines) > 1:
        done = run(["-c", DRIVER], tmp_path, input=json.dumps(lines), JAX_NUM_CPU_DEVICES="1")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_that_pages_name_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    files = re.findall(
        r"`((?:jaxlab|sharding|models|train|configs|tests|benchmarks|launch)/[\w/]+\.\w+)", text
    )
    assert not [x for x in links if not (page.parent / x).exists()]
    assert not [x for x in files if not (ROOT / x).exists()]


def test_launch_scripts_are_valid_shell():
    for script in (ROOT / "launch").glob("*.sh"):
        assert os.access(script, os.X_OK), script
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
        said = subprocess.run(["bash", str(script)], capture_output=True, text=True)
        assert said.returncode != 0 and "usage" in said.stdout + said.stderr


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_local_launcher_runs_two_processes(tmp_path):
    jaxlab = tmp_path / "jaxlab"
    jaxlab.write_text(f'#!/bin/sh\nexec {sys.executable} -m configs "$@"\n')
    jaxlab.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "local.sh"), "tiny", "steps=4"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAXLAB": str(jaxlab)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "4").is_dir()
    assert '"processes": 2' in (tmp_path / "runs" / "tiny" / "versions.json").read_text()
