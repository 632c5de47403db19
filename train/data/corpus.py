"""A tokenised corpus: one flat array of ids and where its documents begin, in memory or on disk."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.data.readers import find_files, read_documents
from train.data.tokenizers import fingerprint, load_tokenizer

# Bytes of files from which on tokenised text is kept on disk rather than in memory.
LARGE = 64 << 20


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
    """Tokenises every document of `files` as [bos] ids [eos], in memory or into a cache on disk.

    The cache is `cache_dir`; where that is '', files of more than `LARGE` bytes together use
    `default_cache()` and others none. Of many processes that share a cache one tokenises, in memory
    that does not grow with the files, and the others wait. ValueError when there is no text at all,
    a document cannot be tokenised, or the cache cannot be written.
    """
    cache = Path(cache_dir).expanduser() if cache_dir else None
    if cache is None and _bytes(files) > LARGE:
        cache = default_cache()
    if cache is None:
        return _in_memory(files, tokenizer, column)
    folder = cache / _key(files, tokenizer, column)
    if not folder.is_dir():
        with _alone(cache, folder.name, cache_dir):
            if not folder.is_dir():
                _store(_documents(files, tokenizer, column), folder)
    return _open(folder)


def default_cache() -> Path:
    """jaxlab in $XDG_CACHE_HOME, which is ~/.cache where it is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxlab"


def _documents(files: tuple[str, ...], name: str, column: str) -> Iterator[np.ndarray]:
    """[bos] ids [eos] of every document that holds text, in the smallest type that fits."""
    tokenizer = load_tokenizer(name)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    begin, end = (np.array([] if t is None else [t], dtype) for t in (tokenizer.bos, tokenizer.eos))
    some = False
    for pattern in files:
        for where, text in read_documents(pattern, column):
            if not text:
                continue
            try:
                ids = tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            some = True
            yield np.concatenate([begin, np.asarray(ids, dtype), end])
    if not some:
        raise ValueError(f"source.files={list(files)}: there is no text in them")


def _in_memory(files: tuple[str, ...], tokenizer: str, column: str) -> Corpus:
    parts = list(_documents(files, tokenizer, column))
    return Corpus(np.concatenate(parts), _spans(np.cumsum([len(p) for p in parts])))


def _spans(stops: np.ndarray) -> np.ndarray:
    return np.stack([np.concatenate([[0], stops[:-1]]), stops], 1).astype(np.int64)


def _bytes(files: tuple[str, ...]) -> int:
    found = (find_files(f) for f in files if not f.startswith("builtin:"))
    return sum(file.stat().length for group in found for file in group)


def _key(files: tuple[str, ...], tokenizer: str, column: str) -> str:
    """Hash of what the ids depend on: files by name, size and date, the tokenizer by its contents."""
    listed = []
    for pattern in files:
        if pattern.startswith("builtin:"):
            listed.append([pattern, sys.version])
            continue
        for file in find_files(pattern):
            stat = file.stat()
            listed.append([str(file), stat.length, stat.mtime])
    what = [listed, fingerprint(tokenizer), column]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _alone(cache: Path, name: str, asked: str) -> Iterator[None]:
    """Waits until no other process writes `name` in the cache; ValueError if that is not writable.

    The lock ends with its process, however that ends, so none is ever stale. Where a file system has
    no locks the work may be done twice, with the same result.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{name}.lock").open("w")
    except OSError as error:
        why = "" if asked else f" (the default for files of more than {LARGE >> 20} MiB)"
        raise ValueError(
            f"source.cache_dir={asked!r}: cannot write in {cache}{why}: {error.strerror}; "
            "name a folder that can be written"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process to tokenise into {cache / name}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _store(documents: Iterator[np.ndarray], folder: Path) -> None:
    """Writes beside and renames: a killed run leaves no half corpus; of two writers one wins."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="writing-") as beside:
        half = Path(beside) / "corpus"
        half.mkdir()
        total, dtype = 0, None
        with (half / "ids").open("wb") as ids, (half / "stops").open("wb") as stops:
            for document in documents:
                total, dtype = total + len(document), document.dtype
                ids.write(document.tobytes())
                stops.write(np.int64(total).tobytes())
        (half / "ids").rename(half / f"ids.{dtype}")
        try:
            half.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _open(folder: Path) -> Corpus:
    (ids,) = folder.glob("ids.*")
    stops = np.fromfile(folder / "stops", np.int64)
    return Corpus(np.memmap(ids, ids.suffix[1:], "r"), _spans(stops))
