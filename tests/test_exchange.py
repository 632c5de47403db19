"""Runs from and to other libraries: import, train, sample and export as one would type them."""

import dataclasses
import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import presets
from models.json_object import read_json
from sharding.mesh import MeshShape
from tests.test_hf import SMALL, write
from train.checkpoint import Checkpoints
from train.cli import main
from train.exchange import import_hf
from train.folders import end_tokens
from train.run import load_run

SMALL_RUN = [
    "source.tokenizer=bytes", "source.seq_len=32", "batch=4", "steps=1", "log_every=1", "mesh.data=1",
]  # fmt: skip


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


def test_full_fine_tuning_of_a_bfloat16_model_moves_most_weights(tmp_path, said):
    """Updates of 1e-5 round to nothing in bfloat16."""
    arrays = write(tmp_path / "m", dtype="bfloat16", scale=0.2)
    fields = " ".join(SMALL_RUN)
    said(f"import hf m --run-dir a {fields} evaluators.0.batches=1 optimizer.warmup=0")
    said("train a --quiet")
    said("export hf a out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    used = [n for n in arrays if "embed" not in n]  # rows of characters that no text has stay
    moved = [np.mean(after[n] != arrays[n].astype(np.float32)) for n in used]
    assert min(moved) > 0.9
    said(f"import hf m --run-dir b --lora 2 {fields}")
    assert load_run(tmp_path / "b").model.base.param_dtype == "bfloat16"
    said(f"import hf m --run-dir c {fields} model.param_dtype=bfloat16")
    assert load_run(tmp_path / "c").model.param_dtype == "bfloat16"


def test_an_interrupted_import_leaves_no_run(tmp_path, monkeypatch):
    write(tmp_path / "m")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", die)
        import_hf(tmp_path / "m", tmp_path / "run", SMALL_RUN)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    # What a killed process leaves.
    (tmp_path / "run.partial" / "new").mkdir(parents=True)
    (tmp_path / "run.partial" / "new" / "half").touch()
    import_hf(tmp_path / "m", tmp_path / "run", SMALL_RUN)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "run"]
    assert not (tmp_path / "run" / "half").exists()


def test_imported_weights_are_never_replaced_by_random_ones(tmp_path, said):
    write(tmp_path / "m")
    said(f"import hf m --run-dir a {' '.join(SMALL_RUN)}")
    for line in ("train a --run-dir b", "train a --fresh"):
        assert "would start from random ones: jaxlab import hf" in said(line, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m"]
    assert (tmp_path / "a" / "checkpoints" / "0").is_dir()


def tokenizer(folder, size=260):
    """A tokenizer.json of `size` one-letter words."""
    words = {chr(0x4E00 + i): i for i in range(size)}
    model = {"type": "WordLevel", "unk_token": chr(0x4E00), "vocab": words}
    data = {"version": "1.0", "added_tokens": [], "model": model}
    (folder / "tokenizer.json").write_text(
        json.dumps(data | {"pre_tokenizer": {"type": "Whitespace"}})
    )


def test_a_run_is_moved_with_its_tokenizer(tmp_path, said):
    write(tmp_path / "m", scale=0.2)
    tokenizer(tmp_path / "m")
    line = json.dumps({"text": " ".join(chr(0x4E00 + i) for i in range(50))})
    (tmp_path / "text.jsonl").write_text("\n".join([line] * 20))
    fields = " ".join(SMALL_RUN[1:])
    said(f"import hf m {fields} source.files=text.jsonl")
    (tmp_path / "runs" / "m").rename(tmp_path / "there")
    assert "{run}/tokenizer.json" in (tmp_path / "there" / "config.json").read_text()
    said("train there --quiet evaluators.0.batches=1")
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    where = str(tmp_path / "elsewhere" / "tokenizer.json")
    assert load_run(tmp_path / "elsewhere").source.tokenizer == where
    assert "nothing to do" not in said("train elsewhere --quiet evaluators.0.batches=1")
    said("export hf elsewhere out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_tokenizer_fits_the_model(tmp_path, said):
    write(tmp_path / "m")
    assert "m has no tokenizer.json: give source.tokenizer=FILE" in said("import hf m", 2)
    tokenizer(tmp_path / "m", 300)
    assert "model.vocab=260 does not match source.tokenizer" in said("import hf m", 2)
    (tmp_path / "m" / "tokenizer.json").write_text("[]")
    assert "tokenizer.json is not a tokenizer.json" in said("import hf m", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_config_of_the_source_comes_back(tmp_path, said):
    write(tmp_path / "m", eos_token_id=[7, 9], bos_token_id=3, max_position_embeddings=77)
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": 5}')
    said(f"import hf m --run-dir a {' '.join(SMALL_RUN)}")
    assert end_tokens(tmp_path / "a") == [5, 7, 9]
    said("export hf a out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["eos_token_id"] == [7, 9] and config["bos_token_id"] == 3
    assert config["max_position_embeddings"] == 77
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert "seq_len=99 exceeds" in said("import hf m source.tokenizer=bytes source.seq_len=99", 2)


def test_export_reads_nothing_but_the_parameters_on_the_mesh_of_the_run(
    tmp_path, monkeypatch, said
):
    write(tmp_path / "m", dataclasses.replace(SMALL, vocab=264))
    said(f"import hf m --run-dir a {' '.join(SMALL_RUN[:2])}")
    assert load_run(tmp_path / "a").mesh == MeshShape(data=1, fsdp=-1)
    asked, plain = [], Checkpoints.restore

    def restore(self, abstract, step=None, only=None):
        asked.append((only, abstract.params["head"].sharding.num_devices))
        return plain(self, abstract, step, only)

    monkeypatch.setattr(Checkpoints, "restore", restore)
    said("export hf a out")
    assert asked == [("params", jax.device_count())]
    assert "--merge: a has no adapter to merge" in said("export hf a other --merge", 2)


def test_defaults_suit_the_size_of_the_model(tmp_path, monkeypatch):
    write(tmp_path / "m")
    monkeypatch.setattr("train.exchange.TILE_LOGITS", 260 * 16)
    monkeypatch.setattr("train.exchange.LARGE", 10)
    # 260 rows of the embedding do not divide over 8 devices.
    import_hf(tmp_path / "m", tmp_path / "run", SMALL_RUN[:2])
    run = load_run(tmp_path / "run")
    assert run.objective.tiles == 2 and run.mesh == MeshShape()
    assert (run.model.context.core, run.model.remat) == ("auto", "full")


@pytest.fixture
def adapter(tmp_path, said):
    """A PEFT folder of rank 2 for the directory m."""
    write(tmp_path / "m")
    said(f"import hf m --run-dir a --lora 2 {' '.join(SMALL_RUN)}")
    said("export hf a adapter --dtype bfloat16")
    return tmp_path / "adapter"


def test_an_adapter_keeps_its_rank_type_and_base(adapter, said):
    arrays = load_file(adapter / "adapter_model.safetensors")
    assert {x.dtype for x in arrays.values()} == {jnp.dtype("bfloat16")}
    said_base = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    assert said_base == str(adapter.parent / "m")
    given = "import hf m --run-dir b --adapter adapter source.tokenizer=bytes"
    assert "model.rank=5 is not the adapter's 2" in said(f"{given} model.rank=5", 2)
    assert "model.base.layers=4 is not the imported" in said(f"{given} model.base.layers=4", 2)
    line = "import hf m --run-dir b source.tokenizer=bytes --lora 33"
    assert "model.rank=33 must be at most model.base.d_model=32" in said(line, 2)
    said(f"{given} {' '.join(SMALL_RUN[1:])}")
    assert load_run(adapter.parent / "b").model.lora_dtype == "float32"
    with pytest.raises(ValueError, match="exclude each other"):
        import_hf(adapter.parent / "m", adapter.parent / "c", [], 7, adapter)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": None}, "r=None must be a positive integer"),
        ({"lora_alpha": "16"}, "lora_alpha='16' must be"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=[1] is not supported"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"init_lora_weights": True, "bias": "none", "eva_config": None, "rank_pattern": {}}, ""),
    ],
)
def test_adapters_that_are_not_computed_are_refused(changes, message, adapter, said):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(read_json(file) | changes))
    line = f"import hf m --run-dir b --adapter adapter {' '.join(SMALL_RUN)}"
    assert message in said(line, 2 if message else 0)


def test_damaged_adapters_are_named(adapter, said):
    line = "import hf m --run-dir b --adapter adapter source.tokenizer=bytes"
    for name, text, message in (
        ("adapter_model.safetensors", "{}", "adapter_model.safetensors is no safetensors file"),
        ("adapter_config.json", "[]", "adapter_config.json must hold a JSON object, not list"),
        ("adapter_config.json", "{", "adapter_config.json is not JSON"),
    ):
        (adapter / name).write_text(text)
        assert message in said(line, 2)


def test_an_export_that_dies_leaves_nothing(adapter, monkeypatch, said):
    place = adapter.parent
    (place / "full.partial" / "new").mkdir(parents=True)
    monkeypatch.setattr(
        "models.peft.write_tensors", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    assert "full" in said("export hf a out", 2)
    assert not list(place.glob("out*"))
    monkeypatch.undo()
    monkeypatch.chdir(place)
    said("export hf a full")
    assert not list(place.glob("*.partial"))


def test_a_hugging_face_directory_is_no_run(tmp_path, said):
    write(tmp_path / "m")
    for line in ("export hf m out", "sample m", "train m", "eval m"):
        assert "is a Hugging Face directory, no run: jaxlab import hf m" in said(line, 2)
