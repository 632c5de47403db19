"""Launch lines of docs, presets and manifests plan on their devices; the scripts start what they say."""

import os
import re
import shlex
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import yaml

from configs import presets
from train.cli import parse, resolve
from train.trainer import DIVERGED, STOPPED

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
BIG = [name for name, preset in presets().items() if " chips or more" in preset.doc]
WRONG_INVOCATION = 2


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]


def job() -> dict:
    return jobset()["replicatedJobs"][0]["template"]["spec"]


def container() -> dict:
    (only,) = job()["template"]["spec"]["containers"]
    return only


def least_chips(name: str) -> int:
    """The devices that a preset's docstring asks for."""
    return int(re.search(r"of (\d+) chips or more", presets()[name].doc)[1])


def launch_lines() -> dict[str, tuple[int, list[str]]]:
    """Where a line stands: on how many devices, and the words after `jaxlab train`."""
    texts = {"running.md": (ROOT / "docs" / "running.md").read_text()}
    texts |= {name: preset.doc.replace("\\\n", " ") for name, preset in presets().items()}
    found = {}
    for where, text in texts.items():
        for line in re.findall(r"[^\n`|]*launch/\w+\.sh[^\n`|]*", text):
            words = shlex.split(line)
            at = next(i for i, word in enumerate(words) if word.startswith("launch/"))
            script, rest = words[at].removeprefix("launch/"), words[at + 1 :]
            if script == "slurm.sh":
                header = (LAUNCH / script).read_text()
                nodes = int(re.search(r"--nodes=(\d+)", line)[1])
                devices = nodes * int(re.search(r"--gpus-per-node=(\d+)", header)[1])
            elif script == "tpu_pod.sh":
                rest = rest[2:]  # NAME ZONE
                devices = least_chips(rest[0])
            else:
                devices = 2 * 4
            found[f"{where} {script}"] = devices, rest
    words = [*container()["command"], *container()["args"]]
    assert words[:2] == ["jaxlab", "train"]
    chips = job()["parallelism"] * container()["resources"]["limits"]["google.com/tpu"]
    found["gke_jobset.yaml"] = chips, words[2:]
    return found


LINES = launch_lines()


def test_every_kind_of_launch_is_documented():
    scripts = {f"running.md {p.name}" for p in LAUNCH.glob("*.sh")}
    assert scripts | {"gke_jobset.yaml", "llama3_8b tpu_pod.sh"} <= set(LINES)


@pytest.mark.parametrize("where", LINES)
def test_launch_lines_plan_on_their_devices(where, tmp_path):
    devices, words = LINES[where]
    words = [word for word in words if word != "--distributed"]  # the other processes are not here
    done = subprocess.run(
        [sys.executable, "-m", "configs", "train", *words, "--plan"], cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"={devices}" in re.search(r"^mesh .*$", done.stdout, re.M)[0] or where.endswith(
        "local.sh"
    )
    assert "FLOPs per step" in done.stdout


@pytest.mark.parametrize("name", BIG)
def test_large_presets_divide_over_the_slices_they_name(name):
    plan = re.search(r"jaxlab (compile --config .*)", presets()[name].doc)[1]
    run = resolve(presets(), name, parse(shlex.split(plan)).overrides)
    slice_ = prod(map(int, re.search(r":([\dx]+)", plan)[1].split("x")))
    assert least_chips(name) == slice_
    for devices in {slice_, 16, 32} - set(range(slice_)):
        assert run.check(devices).mesh.fsdp == devices


def test_the_jobset_restarts_what_a_restart_can_help():
    (rule,) = job()["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert rule["action"] == "FailJob" and codes["operator"] == "In"
    assert codes["values"] == [WRONG_INVOCATION, DIVERGED] and STOPPED not in codes["values"]
    assert codes["containerName"] == container()["name"]
    policy = jobset()["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    # A pod failure policy needs pods that do not restart by themselves.
    assert job()["template"]["spec"]["restartPolicy"] == "Never" and job()["backoffLimit"] == 0


def test_the_jobset_is_one_slice_and_names_its_data():
    pod = job()["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert LINES["gke_jobset.yaml"][0] == prod(map(int, topology.split("x")))
    assert job()["completions"] == job()["parallelism"]
    named = dict(word.split("=") for word in container()["args"])
    (mount,) = container()["volumeMounts"]
    assert {"source.files", "source.tokenizer", "source.cache_dir"} <= set(named)
    paths = [v for k, v in named.items() if k.startswith("source.")]
    for path in [*paths, container()["command"][-1]]:
        assert path.startswith(mount["mountPath"] + "/")
    assert [v["name"] for v in pod["volumes"]] == [mount["name"]]


def program(path: Path, text: str) -> Path:
    """A shell script that stands in for a real command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def launch(script: str, *words: str, cwd: Path, **env: str):
    path = f"{cwd / 'fake'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words], cwd=cwd, capture_output=True, text=True,
        timeout=60, env=os.environ | {"PATH": path} | env,
    )  # fmt: skip


@pytest.mark.parametrize("code", [0, 3, 75])
def test_slurm_runs_what_make_installed_and_requeues_a_saved_run(tmp_path, code):
    program(tmp_path / "fake" / "srun", f'shift; "$@"; exit {code}')
    program(tmp_path / "fake" / "scontrol", 'echo "scontrol $*"')
    words = "llama3_8b", "steps=3"
    none = launch("slurm.sh", *words, cwd=tmp_path, SLURM_JOB_ID="7")
    assert none.returncode == WRONG_INVOCATION and "set JAXLAB" in none.stderr
    tag = f"{sys.version_info[0]}.{sys.version_info[1]}"  # as the Makefile names it
    program(tmp_path / ".venv" / tag / "bin" / "jaxlab", 'echo "jaxlab $*"')
    program(tmp_path / ".venv" / f"peers-{tag}" / "bin" / "jaxlab", "echo wrong")
    done = launch("slurm.sh", *words, cwd=tmp_path, SLURM_JOB_ID="7")
    assert done.returncode == code, done.stderr
    ran = "jaxlab train llama3_8b --distributed --run-dir runs/llama3_8b steps=3"
    assert done.stdout.splitlines() == [ran, *(["scontrol requeue 7"] if code == STOPPED else [])]


def test_tpu_hosts_install_again_after_a_failure_and_after_a_change(tmp_path):
    program(tmp_path / "fake" / "gcloud", 'bash -c "${@: -1}"')
    program(
        tmp_path / "fake" / "git",
        '[ "$1" != clone ] || { mkdir "${@: -1}"; touch "${@: -1}/pyproject.toml"; }',
    )
    pip = program(tmp_path / "pip", f'echo "pip $*"; [ ! -e {tmp_path}/offline ]')
    jaxlab = program(tmp_path / "jaxlab", 'printf "<%s>" jaxlab "$@"')
    python = program(
        tmp_path / "python of today",
        f'mkdir -p "$3/bin"; ln -sf {pip} "$3/bin/pip"; ln -sf {jaxlab} "$3/bin/jaxlab"',
    )

    def go():
        return launch(
            "tpu_pod.sh", "NAME", "ZONE", "tiny", "source.files=/a b/*.parquet", cwd=tmp_path,
            RUN_DIR="/mnt/a", REPOSITORY="https://host/x y.git", PYTHON=str(python),
        )  # fmt: skip

    installed = "pip install --quiet -e .[tpu,data,gcs,hf]\n"
    ran = "<jaxlab><train><tiny><--distributed><--run-dir></mnt/a><source.files=/a b/*.parquet>"
    (tmp_path / "offline").touch()
    failed = go()
    assert failed.returncode != 0 and failed.stdout == installed
    (tmp_path / "offline").unlink()
    assert go().stdout == installed + ran
    assert go().stdout == ran
    marker = tmp_path / "jaxlab-src" / ".venv" / "tpu" / "ready"
    os.utime(marker, (0, 0))  # pyproject.toml is newer now
    assert go().stdout == installed + ran
