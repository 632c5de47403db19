"""Runs from and to other libraries: import, train, sample and export as one would type them."""

import shlex

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import presets
from tests.test_hf import write
from train.cli import main

SMALL_RUN = ["source.tokenizer=bytes", "source.seq_len=32", "batch=8", "steps=1", "log_every=1"]


@pytest.fixture
def said(tmp_path, monkeypatch, capfd):
    """Runs a `jaxlab` line in an empty folder: what it wrote, or, if it may fail, what it said."""
    monkeypatch.chdir(tmp_path)

    def run(line: str, code: int = 0) -> str:
        assert main(presets(), shlex.split(line)) == code, capfd.readouterr().err
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return err if code else out

    return run


def test_a_lora_run_is_sampled_exported_merged_and_gone_on_with(tmp_path, said):
    arrays = write(tmp_path / "m", scale=0.2)
    fields = " ".join(SMALL_RUN)
    said(f"import hf m --run-dir a --lora 2 {fields} evaluators.0.batches=1 optimizer.lr=0.01")
    said("train a --quiet")
    text = said('sample a --prompt "ab" --tokens 4 --temperature 0')
    assert text.startswith("ab")
    said("export hf a adapter")
    said("export hf a merged --merge")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    moved = {n for n, x in merged.items() if not np.array_equal(x, arrays[n])}
    assert moved == {n for n in arrays if "q_proj" in n or "v_proj" in n}
    said(f"import hf m --run-dir b --adapter adapter {fields}")
    assert said('sample b --prompt "ab" --tokens 4 --temperature 0') == text
