"""Greedy generation, token by token what `transformers` makes: recorded, or fresh from a peer.

JAXLAB_PEER_PYTHON names a Python that has torch and transformers; with it the cases are made anew.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import pytest

from jaxlab.sampling import GREEDY
from models.decoder import DecoderConfig
from models.generate import generate

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))
import generation  # noqa: E402

RECORDED = json.loads((HERE / "cases" / "generation.json").read_text())
PEER = os.environ.get("JAXLAB_PEER_PYTHON")


def ours(case) -> np.ndarray:
    c = case["sizes"]
    module = DecoderConfig(**c).build("cpu")
    flat = generation.weights(c, case["seed"])
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    texts, stop = generation.prompts(c, case["seed"])
    prompts = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(prompts, texts, strict=True):
        row[: len(text)] = text
    call = functools.partial(
        generate, module, new=generation.NEW, stop=tuple(stop), sampling=GREEDY
    )
    call = jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})
    lengths = np.array([len(text) for text in texts], np.int32)
    return np.asarray(call(params, prompts, lengths, jax.random.key(0)).tokens[:, 0])


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"model{case['seed']}")
def test_tokens_are_those_that_transformers_recorded(case):
    assert case["sizes"] == generation.sizes(case["seed"])
    np.testing.assert_array_equal(ours(case), case["tokens"])


def test_the_record_covers_what_it_should():
    cases = RECORDED["cases"]
    assert len(cases) == 20
    assert {c["sizes"]["heads"] // c["sizes"]["kv_heads"] for c in cases} == {1, 2, 4, 8}
    assert {(c["sizes"]["tied"], c["sizes"]["qk_norm"]) for c in cases} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    # Some rows were ended by a stop token, and no choice hung on rounding.
    assert any(0 in row for case in cases for row in case["tokens"])
    assert all(case["margin"] > 1e-4 for case in cases)


@pytest.mark.skipif(not PEER, reason="JAXLAB_PEER_PYTHON is not set")
def test_a_peer_that_is_here_makes_the_recorded_tokens(tmp_path):
    fresh = tmp_path / "fresh.json"
    subprocess.run([PEER, HERE / "peers" / "generation.py", fresh], check=True, timeout=540)
    for case, old in zip(json.loads(fresh.read_text())["cases"], RECORDED["cases"], strict=True):
        assert case["tokens"] == old["tokens"], case["seed"]
