"""Text as a source: readers, rows, packing, mixtures, resuming, errors."""

import concurrent.futures
import dataclasses
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.bigram import bigram_loss
from train.data.corpus import Corpus, load_corpus
from train.data.packing import Rows, Stream, Windows
from train.data.readers import read_documents
from train.data.text import Text, load_tokenizer

ROOT = Path(__file__).parent.parent

DOCS = ["hello world", "a", "the quick brown fox", "", "jumps over\nthe lazy dog", "näïve ∑"]


def write(folder, kind: str, docs=DOCS):
    """The documents in a file of that kind."""
    file = folder / f"docs{kind}"
    if kind == ".jsonl":
        file.write_text("\n".join(json.dumps({"text": d, "n": 1}) for d in docs))
    elif kind == ".jsonl.gz":
        file.write_bytes(gzip.compress("\n".join(json.dumps({"text": d}) for d in docs).encode()))
    elif kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": docs, "n": list(range(len(docs)))}), file)
    elif kind == ".array_record":
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(file), "group_size:1")
        for doc in docs:
            writer.write(doc.encode())
        writer.close()
    return file


def documents(corpus: Corpus) -> list[str]:
    return [bytes(corpus.ids[a + 1 : b - 1]).decode() for a, b in corpus.spans]


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet", ".array_record"])
def test_every_format_gives_the_same_documents(tmp_path, kind):
    corpus = load_corpus((str(write(tmp_path, kind)),), "bytes", "text", "")
    assert documents(corpus) == [d for d in DOCS if d]


def test_plain_files_are_documents_and_globs_are_sorted(tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for i, doc in enumerate(DOCS):
        (folder / f"{i}.txt").write_text(doc)
    (folder / "ignored.bin").write_bytes(b"\xff")
    expected = [d for d in DOCS if d]
    for pattern in (str(folder), str(folder / "*.txt"), str(tmp_path / "*" / "?.txt")):
        assert documents(load_corpus((pattern,), "bytes", "text", "")) == expected


def make_corpus(lengths) -> Corpus:
    """Documents of these lengths, all ids distinct."""
    stops = np.cumsum(lengths)
    return Corpus(np.arange(stops[-1]), np.stack([stops - lengths, stops], 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=8),
    st.integers(1, 17),
    st.randoms(use_true_random=False),
)
def test_windows_against_a_walk_over_the_tokens(lengths, seq_len, random):
    corpus = make_corpus(np.asarray(lengths))
    order = list(range(len(lengths)))
    random.shuffle(order)
    windows = Windows(corpus, seq_len, np.asarray(order))
    walk = []  # (token, next token or -1, document)
    for d in order:
        ids = list(range(*corpus.spans[d]))
        walk += [(i, n, d) for i, n in zip(ids, [*ids[1:], -1], strict=True)]
    for r in range(len(windows)):
        row = windows[r]
        part = walk[r * seq_len : (r + 1) * seq_len]
        pad = seq_len - len(part)
        assert list(row["tokens"]) == [t for t, _, _ in part] + [0] * pad
        assert list(row["targets"]) == [n for _, n, _ in part] + [-1] * pad
        seen, segments, positions = [], [], []
        for _, _, d in part:
            if d not in seen:
                seen.append(d)
                positions.append(0)
            else:
                positions.append(positions[-1] + 1)
            segments.append(len(seen))
        assert list(row["segment_ids"]) == segments + [0] * pad
        assert list(row["positions"]) == positions + [0] * pad
    targets = np.concatenate([windows[r]["targets"] for r in range(len(windows))])
    assert sorted(targets[targets >= 0]) == sorted(n for _, n, _ in walk if n >= 0)


def test_each_epoch_holds_every_row_once_in_another_order():
    corpus = make_corpus(np.full(10, 13))
    rows = Rows([Windows(corpus, 8)], None, 4, 7, shuffle=True)
    n = len(rows.windows[0])
    firsts = [int(rows._row(i)["tokens"][0]) for i in range(2 * n)]
    assert sorted(firsts[:n]) == sorted(firsts[n:]) == [8 * i for i in range(n)]
    assert firsts[:n] != firsts[n:]


def test_batch_is_a_pure_function_of_step_and_rows():
    source = Text(seq_len=32)
    one, two = (source.make(8, seed=3, split="train") for _ in range(2))
    two.batch_at(0)
    whole, late = one.batch_at(11), two.batch_at(11, slice(5, 8))
    for name in whole:
        np.testing.assert_array_equal(whole[name][5:], late[name])
    other = source.make(8, seed=4, split="train").batch_at(11)
    assert (other["tokens"] != whole["tokens"]).any()


def test_held_out_text_is_fixed_exact_and_not_trained_on():
    source = Text(seq_len=64)
    splits = {s: source.make(4, seed=0, split=s) for s in ("train", "valid")}
    again = source.make(4, seed=9, split="valid")
    counted = 0
    for step in range(splits["valid"].num_batches):
        batch = splits["valid"].batch_at(step)
        np.testing.assert_array_equal(batch["tokens"], again.batch_at(step)["tokens"])
        counted += (batch["targets"] >= 0).sum()
    assert counted == splits["valid"].tokens_total - splits["valid"].documents
    beyond = splits["valid"].batch_at(splits["valid"].num_batches)
    assert (beyond["targets"] == -1).all() and (beyond["segment_ids"] == 0).all()
    whole = load_corpus(source.files, "bytes", "text", "")
    train, valid = (set(map(tuple, whole.split(0.05, s).spans)) for s in ("train", "valid"))
    assert not train & valid and len(train) + len(valid) == len(whole.spans)


def test_few_documents_are_split_inside():
    corpus = make_corpus(np.asarray([100, 50]))
    train, valid = corpus.split(0.1, "train"), corpus.split(0.1, "valid")
    np.testing.assert_array_equal(train.spans, [[0, 90], [100, 145]])
    np.testing.assert_array_equal(valid.spans, [[90, 100], [145, 150]])


def test_mixture_follows_the_weights(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 5000)
    files = tuple(str(tmp_path / f"{n}.txt") for n in "ab")
    rows = Text(files=files, weights=(1.0, 3.0), seq_len=16).make(40, seed=0, split="train")
    tokens = np.concatenate([rows.batch_at(i)["tokens"].ravel() for i in range(10)])
    assert np.mean(tokens == ord("b")) == pytest.approx(0.75, abs=0.02)


def test_first_fit_keeps_short_documents_whole_and_resumes_exactly(tmp_path):
    rng = np.random.default_rng(0)
    docs = ["x" * n for n in rng.integers(1, 30, 300)]
    source = Text(files=(str(write(tmp_path, ".jsonl", docs)),), seq_len=32, packing="first_fit")
    stream = source.make(8, seed=0, split="train")
    assert isinstance(stream, Stream)
    batches = [next(stream) for _ in range(3)]
    state = json.loads(json.dumps(stream.get_state()))
    later = [next(stream) for _ in range(3)]
    fresh = source.make(8, seed=0, split="train")
    fresh.set_state(state)
    for batch, expected in zip([next(fresh) for _ in range(3)], later, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name])
    for batch in batches:
        real = batch["segment_ids"] > 0
        assert (batch["targets"][~real] == -1).all()
        starts = (batch["positions"] == 0) & real
        assert (np.diff(batch["segment_ids"], axis=1)[starts[:, 1:]] == 1).all()
        assert (batch["tokens"][starts] == 0).all()
        ends = np.diff(batch["segment_ids"], axis=1, append=0) != 0
        assert (batch["targets"][ends & real] == 0).all()
        assert np.mean(real) > 0.75
    with pytest.raises(ValueError, match="packing=concat"):
        source.make(8, seed=0, split="train", process_count=2).set_state(state)


def test_first_fit_processes_share_the_pieces(tmp_path):
    docs = [f"{i:06d}" for i in range(400)]
    source = Text(files=(str(write(tmp_path, ".jsonl", docs)),), seq_len=8, packing="first_fit")
    seen = []
    for index in range(2):
        part = source.make(8, seed=0, split="train", process_index=index, process_count=2)
        got = [next(part) for _ in range(10)]
        assert got[0]["tokens"].shape == (4, 8)
        seen.append({bytes(r[1:7].astype(np.uint8)) for b in got for r in b["tokens"]})
    assert not seen[0] & seen[1]


def test_cache_is_mapped_and_renewed_when_the_file_changes(tmp_path):
    file = write(tmp_path, ".jsonl")
    args = ((str(file),), "bytes", "text", str(tmp_path / "cache"))
    first = load_corpus(*args)
    assert isinstance(first.ids, np.memmap)
    load_corpus.cache_clear()
    assert documents(load_corpus(*args)) == documents(first)
    write(tmp_path, ".jsonl", [*DOCS, "new"])
    load_corpus.cache_clear()
    assert documents(load_corpus(*args))[-1] == "new"
    assert len(corpora(tmp_path / "cache")) == 2


def corpora(cache):
    """Whole corpora in a cache; fails on anything else but their locks."""
    found = [p for p in cache.iterdir() if p.is_dir()]
    assert {p.name for p in cache.iterdir()} <= {
        p.name + end for p in found for end in ("", ".lock")
    }
    return found


def test_the_cache_holds_what_memory_would(tmp_path, tokenizer):
    files = (str(write(tmp_path, ".jsonl")), "builtin:pydoc")
    for name in ("bytes", str(tokenizer)):
        kept, plain = (load_corpus(files, name, "text", c) for c in (str(tmp_path / "cache"), ""))
        assert isinstance(kept.ids, np.memmap) and not isinstance(plain.ids, np.memmap)
        assert kept.ids.dtype == plain.ids.dtype and kept.spans.dtype == plain.spans.dtype
        np.testing.assert_array_equal(kept.ids, plain.ids)
        np.testing.assert_array_equal(kept.spans, plain.spans)


def test_large_files_are_cached_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("x" * 100)
    large.write_text("y" * 101)
    monkeypatch.setattr("train.data.corpus.LARGE", 100)
    assert not isinstance(load_corpus((str(small),), "bytes", "text", "").ids, np.memmap)
    assert not (tmp_path / "home").exists()
    assert isinstance(load_corpus((str(large),), "bytes", "text", "").ids, np.memmap)
    assert len(corpora(tmp_path / "home" / "jaxlab")) == 1
    assert isinstance(load_corpus((str(small), str(small)), "bytes", "text", "").ids, np.memmap)


def test_of_many_readers_one_tokenises_and_the_others_wait(tmp_path, monkeypatch, capsys):
    file, read = write(tmp_path, ".jsonl"), []

    def slow(pattern, column):
        read.append(pattern)
        time.sleep(0.3)
        yield from read_documents(pattern, column)

    monkeypatch.setattr("train.data.corpus.read_documents", slow)
    args = (str(file),), "bytes", "text", str(tmp_path / "cache")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_corpus.__wrapped__(*args), range(4)))
    assert len(read) == 1
    assert all(documents(corpus) == [d for d in DOCS if d] for corpus in found)
    assert "waiting for another process to tokenise into" in capsys.readouterr().err


def test_a_failed_or_killed_writer_leaves_no_corpus_and_no_lock(tmp_path):
    file, cache = tmp_path / "x.jsonl", tmp_path / "cache"
    file.write_text('{"text": "a"}\n{nope}')
    args = (str(file),), "bytes", "text", str(cache)
    for _ in range(2):
        with pytest.raises(ValueError, match="x.jsonl:2: not JSON"):
            load_corpus(*args)
    assert not [p for p in cache.iterdir() if p.is_dir()]
    file.write_text('{"text": "a"}\n{"text": "b"}')
    code = (
        "import os, sys; from train.data import corpus, readers\n"
        "def dies(*a):\n yield 'x', 'a'\n os._exit(9)\n"
        f"corpus.read_documents = dies; corpus.load_corpus(*{args!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    assert documents(load_corpus(*args)) == ["a", "b"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_cache_that_cannot_be_written_names_its_field(tmp_path, monkeypatch, asked):
    blocked = tmp_path / "file"
    blocked.write_text("x" * 10)
    monkeypatch.setattr("train.data.corpus.LARGE", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    source = Text(files=(str(write(tmp_path, ".jsonl")),), cache_dir=str(blocked) if asked else "")
    with pytest.raises(ValueError, match=r"source.cache_dir='.*cannot write in .*file"):
        source.make(2, seed=0, split="train")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_tokenising_into_the_cache_does_not_hold_the_corpus(tmp_path):
    """Peak memory beyond the imports, 160 MB of JSON lines: with the cache, and without it."""
    line = json.dumps({"text": "word " * 400}) + "\n"
    (tmp_path / "big.jsonl").write_text(line * (160_000_000 // len(line)))

    def grown(large, cache):
        code = (
            "import re; from pathlib import Path; from train.data import corpus\n"
            # The peak of getrusage is also that of the parent before exec.
            "status = lambda: Path('/proc/self/status').read_text()\n"
            "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+) kB', status())[1])\n"
            f"corpus.LARGE = {large}; before = peak()\n"
            f"found = corpus.load_corpus(({str(tmp_path / 'big.jsonl')!r},), 'bytes', 'text', {cache!r})\n"
            "assert found.tokens > 150_000_000\n"
            "print((peak() - before) * 1024)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert grown(1 << 40, "") > 150e6
    assert grown(1 << 40, str(tmp_path / "cache")) < 20e6


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(DOCS * 5, trainer)
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_hugging_face_tokenizer(tokenizer):
    ours = load_tokenizer(str(tokenizer))
    assert (ours.bos, ours.eos) == (0, 1)
    for doc in DOCS:
        assert ours.decode(ours.encode(doc)) == doc
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>"}))
    assert load_tokenizer(str(tokenizer / "tokenizer.json")).bos == 1
    source = Text(files=(str(write(tokenizer, ".parquet")),), tokenizer=str(tokenizer), seq_len=4)
    batch = source.make(2, seed=0, split="train").batch_at(0)
    assert batch["tokens"].max() < ours.vocab_size == source.vocab_size()


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"bos_token": None}, (None, 1)),
        ({"add_bos_token": False}, (None, 1)),
        ({"add_bos_token": True, "eos_token": None}, (0, None)),
    ],
)
def test_special_tokens_that_the_configuration_takes_away(tokenizer, config, expected):
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(str(tokenizer))
    assert (ours.bos, ours.eos) == expected


def test_a_damaged_tokenizer_configuration_is_named(tokenizer):
    (tokenizer / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json must hold a JSON object"):
        load_tokenizer(str(tokenizer))


def test_the_cache_depends_on_the_names_of_special_tokens(tokenizer):
    files, cache = (str(write(tokenizer, ".jsonl")),), tokenizer / "cache"
    firsts = []
    for config in (None, {"bos_token": "<s>"}, {"bos_token": "</s>"}):
        if config:
            (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
        load_corpus.cache_clear()
        firsts.append(int(load_corpus(files, str(tokenizer), "text", str(cache)).ids[0]))
    assert firsts == [0, 0, 1] and len(corpora(cache)) == 3


def test_a_tokenizer_without_special_tokens_adds_none(tokenizer):
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"] = []
    for i, name in enumerate(("<s>", "</s>")):
        content["model"]["vocab"][f"plain{i}"] = content["model"]["vocab"].pop(name)
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    ours = load_tokenizer(str(tokenizer))
    corpus = load_corpus((str(write(tokenizer, ".jsonl")),), str(tokenizer), "text", "")
    assert (ours.bos, ours.eos) == (None, None) and corpus.ids.dtype == np.uint16
    assert [ours.decode(corpus.ids[a:b]) for a, b in corpus.spans] == [d for d in DOCS if d]


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))))
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bigram_against_a_plain_count(tmp_path):
    docs = ["abababac", "abcabc", "cab"] * 20
    source = Text(files=(str(write(tmp_path, ".jsonl", docs)),), seq_len=5, valid_fraction=0.2)
    train, valid = (source.make(2, seed=0, split=s) for s in ("train", "valid"))
    pairs, single, first = {}, np.ones(256), {}
    for tokens, targets in train.pairs():
        for a, b in zip(tokens, targets, strict=True):
            if b >= 0:
                pairs[a, b] = pairs.get((a, b), 0) + 1
                first[a] = first.get(a, 0) + 1
                single[b] += 1
    single /= single.sum()
    losses = []
    for k in 2.0 ** np.arange(-4, 12):
        terms = [
            -np.log((pairs.get((a, b), 0) + k * single[b]) / (first.get(a, 0) + k))
            for tokens, targets in valid.pairs()
            for a, b in zip(tokens, targets, strict=True)
            if b >= 0
        ]
        losses.append(np.mean(terms))
    assert bigram_loss(train, valid, 256) == pytest.approx(min(losses), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ()}, "at least one file"),
        ({"files": ("a.txt",), "weights": (1.0, 2.0)}, "one weight for each"),
        ({"weights": (0.0,)}, "positive"),
        ({"weights": (float("nan"),)}, "positive"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"packing": "best"}, "first_fit"),
        ({"valid_fraction": 1.0}, "between 0 and 1"),
        ({"files": ("builtin:pydocs",)}, "builtin:pydoc'"),
        (
            {"seq_len": 10**7},
            r"hold \d+ training tokens, .* use source.seq_len <= \d+ or more text",
        ),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Text(), **change).make(2, seed=0, split="train")


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}', "text", r"x.jsonl:2: no text in source.column"),
        ("x.jsonl", b'{"text": "a"}\n{nope}', "text", r"x.jsonl:2: not JSON"),
        ("x.jsonl", b'{"text": "a"}', "body", r"source.column='body'; it has \['text'\]"),
        ("x.txt", b"ab\xff", "text", "not UTF-8 at byte 2"),
        ("x.txt", b"a\0b", "text", "NUL"),
        ("x.txt", b"", "text", "no text"),
        ("x.csv", b"a", "text", "ends in none of .txt"),
        ("x.parquet", b"junk", "text", "not a Parquet file"),
        ("x.array_record", b"junk" * 9, "text", "not an ArrayRecord file"),
    ],
)
def test_wrong_files(tmp_path, name, content, column, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Text(files=(str(file),), column=column, seq_len=1).make(2, seed=0, split="train")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing matches"):
        Text(files=(str(tmp_path / "*.txt"),)).make(2, seed=0, split="train")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.csv").write_text("a")
    with pytest.raises(
        FileNotFoundError, match=r"empty' holds no file whose name ends in .*.jsonl"
    ):
        Text(files=(str(tmp_path / "empty"),)).make(2, seed=0, split="train")
    with pytest.raises(FileNotFoundError, match="give 'bytes'"):
        Text(tokenizer=str(tmp_path / "no.json")).make(2, seed=0, split="train")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "bad.json"))


def test_buckets_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    with pytest.raises(ImportError, match=r"source.files: .*gs://b/x.txt.*jaxlab\[gcs\]"):
        Text(files=("gs://b/x.txt",)).make(2, seed=0, split="train")
