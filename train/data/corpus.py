"""A tokenised corpus: one flat array of ids and where its documents begin, in memory or on disk."""

import dataclasses
import functools
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from train.data.readers import find_files, read_documents
from train.data.tokenizers import load_tokenizer, tokenizer_file


@dataclasses.dataclass(frozen=True)
class Corpus:
    """`ids` [tokens] and documents as (begin, end) rows of `spans` [documents, 2]."""

    ids: np.ndarray
    spans: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens in all spans."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def split(self, fraction: float, which: str) -> "Corpus":
        """'train' or 'valid': whole documents, or the tails of documents where there are few.

        The same documents are held out whatever the run's seed, so that losses compare.
        """
        count = len(self.spans)
        held = round(fraction * count)
        if held:
            order = np.random.default_rng(0).permutation(count)
            chosen = np.sort(order[:held] if which == "valid" else order[held:])
            return Corpus(self.ids, self.spans[chosen])
        begin, end = self.spans.T
        cut = end - np.ceil(fraction * (end - begin)).astype(np.int64)
        spans = (begin, cut) if which == "train" else (cut, end)
        return Corpus(self.ids, np.stack(spans, 1))


@functools.lru_cache(maxsize=8)
def load_corpus(files: tuple[str, ...], tokenizer: str, column: str, cache_dir: str) -> Corpus:
    """Tokenises every document of `files` as [bos] ids [eos]; kept in `cache_dir` if it is given.

    ValueError when there is no text at all, or a document cannot be tokenised.
    """
    if not cache_dir:
        return _tokenise(files, tokenizer, column)
    folder = Path(cache_dir).expanduser() / _key(files, tokenizer, column)
    if not folder.is_dir():
        _store(_tokenise(files, tokenizer, column), folder)
    return Corpus(np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "spans.npy"))


def _tokenise(files: tuple[str, ...], name: str, column: str) -> Corpus:
    tokenizer = load_tokenizer(name)
    ends = [[] if t is None else [t] for t in (tokenizer.bos, tokenizer.eos)]
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    parts, lengths = [], []
    for pattern in files:
        for where, text in read_documents(pattern, column):
            if not text:
                continue
            try:
                ids = tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            parts += [np.asarray(x, dtype) for x in (ends[0], ids, ends[1])]
            lengths.append(len(ids) + len(ends[0]) + len(ends[1]))
    if not lengths:
        raise ValueError(f"source.files={list(files)}: there is no text in them")
    stops = np.cumsum(lengths, dtype=np.int64)
    return Corpus(np.concatenate(parts), np.stack([stops - lengths, stops], 1))


def _key(files: tuple[str, ...], tokenizer: str, column: str) -> str:
    """Hash of what the ids depend on: files by name, size and date, tokenizer by content."""
    listed = []
    for pattern in files:
        if pattern.startswith("builtin:"):
            listed.append([pattern, sys.version])
            continue
        for file in find_files(pattern):
            stat = file.stat()
            listed.append([str(file), stat.length, stat.mtime])
    model = tokenizer_file(tokenizer)
    digest = hashlib.sha256(model.read_bytes()).hexdigest() if model else "bytes"
    return hashlib.sha256(json.dumps([listed, digest, column]).encode()).hexdigest()[:20]


def _store(corpus: Corpus, folder: Path) -> None:
    """Writes beside and renames: a killed run leaves no half corpus; of two writers one wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="writing-") as beside:
        half = Path(beside) / "corpus"
        half.mkdir()
        np.save(half / "ids.npy", corpus.ids)
        np.save(half / "spans.npy", corpus.spans)
        try:
            half.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(half)
