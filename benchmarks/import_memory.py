"""Peak host memory of `jaxlab import hf` against the size of the model, on random weights.

    python benchmarks/import_memory.py --gib 4.2

Writes the model file by file into a temporary folder, imports it in a process of its own and prints
and writes sizes as JSON; the folder is removed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.decoder import DecoderConfig  # noqa: E402
from models.hf import INDEX  # noqa: E402
from models.hf_names import entries, hf_config  # noqa: E402


def generate(folder: Path, gib: float) -> int:
    """A random bfloat16 model of at least `gib` GiB, one file a layer; returns its bytes."""
    shape = dict(vocab=32_000, d_model=2048, heads=16, kv_heads=8, head_dim=128, mlp=8192)
    per_layer = 2 * (2048 * 128 * (16 + 8 + 8 + 16) + 3 * 2048 * 8192)
    layers = int((gib * 2**30 - 4 * 32_000 * 2048) / per_layer) + 1
    config = DecoderConfig(layers=layers, qk_norm=True, **shape)
    rng = np.random.default_rng(0)
    files: dict[str, list] = {}
    for entry in entries(config):
        for i, name in enumerate(entry.names):
            file = f"model-{i if entry.stacked else 'rest'}.safetensors"
            files.setdefault(file, []).append((name, entry.hf_shape))
    total, weight_map = 0, {}
    for file, tensors in files.items():
        arrays = {}
        for name, size in tensors:
            bits = rng.integers(0x3C00, 0x3D00, size, np.uint16)
            arrays[name] = bits.view(ml_dtypes.bfloat16)
            total += bits.nbytes
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_config(config, "bfloat16", 4096)))
    return total


def main() -> None:
    """Generates, imports, reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4.2, help="size of the model")
    parser.add_argument("--folder", help="where to put the temporary files")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        source = Path(place) / "model"
        source.mkdir()
        size = generate(source, args.gib)
        command = [sys.executable, "-m", "configs", "import", "hf", str(source)]
        start = time.perf_counter()
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        # The run holds the type of the files, so that sizes compare.
        fields = ["model.param_dtype=bfloat16", "source.tokenizer=bytes"]
        run = ["--run-dir", str(Path(place) / "run")]
        subprocess.run([*command, *run, *fields], check=True, env=env)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    figures = {
        "model_gib": size / 2**30,
        "peak_gib": peak / 2**30,
        "ratio": peak / size,
        "seconds": seconds,
    }
    text = json.dumps(figures | {"date": time.strftime("%Y-%m-%d")}, indent=1)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "import_memory_cpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
