"""Text as it is made: characters stay whole, stop texts never show, pieces add up."""

import contextlib
import io
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.sampling import GREEDY, Sampling
from models.decoder import DecoderConfig
from train.data.tokenizers import Bytes, HuggingFace
from train.report import print_rows
from train.writer import Detokenizer, Writer

cuts = st.lists(st.integers(1, 5), min_size=1, max_size=8)


def pieces(detokenizer, ids, sizes):
    at, made = 0, []
    while at < len(ids):
        size = sizes[len(made) % len(sizes)]
        made.append(detokenizer.push(ids[at : at + size]))
        at += size
    return [*made, detokenizer.finish()]


@settings(max_examples=80, deadline=None)
@given(st.text(st.characters(exclude_characters="\0\ufffd", codec="utf-8"), max_size=12), cuts)
def test_characters_stay_whole_however_bytes_arrive(text, sizes):
    made = pieces(Detokenizer(Bytes(), [0, 84]), list(text.encode()), sizes)
    assert "".join(made) == text and not any("\ufffd" in piece for piece in made)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=12), cuts)
def test_bytes_that_are_no_text_are_replaced_once_they_are_certain(data, sizes):
    whole = Bytes().decode(list(data))
    made = "".join(pieces(Detokenizer(Bytes(), []), list(data), sizes))
    assert made.rstrip("\ufffd") == whole.rstrip("\ufffd")
    assert made.replace("\ufffd", "") == whole.replace("\ufffd", "")


@settings(max_examples=150, deadline=None)
@given(
    st.text("ab", max_size=14), st.lists(st.text("ab", min_size=1, max_size=4), max_size=2), cuts
)
def test_nothing_of_a_stop_text_is_shown(text, stop, sizes):
    expected = min((text.find(s) for s in stop if s in text), default=len(text))
    detokenizer = Detokenizer(Bytes(), [], stop)
    made = pieces(detokenizer, list(text.encode()), sizes)
    first = next((i for i in range(len(text) + 1) if any(s in text[:i] for s in stop)), None)
    if first is None:
        assert "".join(made) == text
    else:
        assert text.startswith("".join(made)) and len("".join(made)) >= expected
        assert not any(s in "".join(made) for s in stop)


def test_spaces_that_depend_on_the_token_before_are_kept(tmp_path):
    """A word-piece decoder writes a space before a word unless it is the first."""
    words = {"[UNK]": 0, "to": 1, "be": 2, "##come": 3}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 9, "vocab": words}  # fmt: skip
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model,
                                "pre_tokenizer": {"type": "Whitespace"}, "decoder": decoder}))  # fmt: skip
    tokenizer = HuggingFace(file)
    prompt = tokenizer.encode("to").tolist()
    assert pieces(Detokenizer(tokenizer, prompt), [2, 3, 1], [1]) == [" be", "come", " to", ""]


def make_writer(**options):
    config = DecoderConfig(layers=1, d_model=16, heads=2, kv_heads=2, head_dim=8, mlp=16)
    module = config.build("cpu")
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    options = dict(tokens=13, samples=2, sampling=Sampling(2.0), piece=4) | options
    return Writer(module, Bytes(), ["ab", "xyz w"], **options), params["params"]


def rows(made) -> dict[int, str]:
    found: dict[int, str] = {}
    for i, text, _ in made:
        found[i] = found.get(i, "") + text
    return found


def test_pieces_add_up_to_the_text_of_one_piece():
    texts = []
    for piece in (13, 4, 1):
        writer, params = make_writer(piece=piece)
        texts.append(rows(writer.write(params, jax.random.key(1))))
    assert texts[0] == texts[1] == texts[2] and sorted(texts[0]) == [0, 1, 2, 3]
    assert all(len(text.encode(errors="replace")) <= 3 * 13 for text in texts[0].values())


def test_rows_end_at_their_stop_text():
    writer, params = make_writer(samples=1, sampling=GREEDY)
    whole = rows(writer.write(params, jax.random.key(0)))
    stop = whole[1][2:4]
    stopping, _ = make_writer(samples=1, sampling=GREEDY, stop=(stop,))
    got = rows(stopping.write(params, jax.random.key(0)))
    assert got[1] == whole[1][: whole[1].find(stop)]


def test_rows_are_printed_in_order_whatever_the_order_they_are_made_in():
    made = [(1, "B", False), (0, "A", False), (1, "b", True), (0, "a", True), (2, "C", True),
            (3, "", True)]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_rows(["p ", "q "], 2, iter(made))
    assert out.getvalue() == (
        "--- prompt 1, sample 1 ---\np Aa\n--- prompt 1, sample 2 ---\np Bb\n"
        "--- prompt 2, sample 1 ---\nq C\n--- prompt 2, sample 2 ---\nq \n"
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_rows(["p "], 1, iter([(0, "A", True)]))
    assert out.getvalue() == "p A\n"


def test_rows_end_at_any_of_the_end_tokens():
    """An `ends` token made by the model ends its row, and has no text."""
    writer, params = make_writer(samples=1, sampling=GREEDY)
    whole = rows(writer.write(params, jax.random.key(0)))
    letter = next(c for c in whole[0][1:] if c.isascii() and c != whole[0][0])
    stopping, _ = make_writer(samples=1, sampling=GREEDY, ends=(ord(letter), 255))
    got = rows(stopping.write(params, jax.random.key(0)))
    assert got[0] == whole[0].partition(letter)[0]


class NoBos(Bytes):
    bos = None


def test_a_prompt_without_tokens_is_refused():
    module = DecoderConfig(layers=1).build("cpu")
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        Writer(module, NoBos(), [""], tokens=1, samples=1, sampling=GREEDY, piece=1)
