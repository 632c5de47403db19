"""Tokenizers by name: bytes, or a Hugging Face tokenizer.json; and one of a few fixed words."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from models.json_object import read_json

# Tried in this order where no tokenizer_config.json says which tokens begin and end a document.
BEGIN = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")
END = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """Text to ids and back; `bos` and `eos` may be absent."""

    vocab_size: int
    bos: int | None
    eos: int | None

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, no special tokens added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        ...


class Bytes:
    """UTF-8 bytes; NUL begins and ends a document."""

    vocab_size: int = 256
    bos: int | None = 0
    eos: int | None = 0

    def encode(self, text: str) -> np.ndarray:
        """One id a byte; ValueError for text that holds a NUL."""
        if "\0" in text:
            raise ValueError("holds a NUL character, which the bytes tokenizer uses as separator")
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """Text; bytes that are no UTF-8 become a replacement character."""
        return bytes(i for i in ids if i).decode(errors="replace")


class Words:
    """A fixed few words; 0 ends a document, 1 is the end of a line."""

    bos: int | None = None
    eos: int | None = 0

    def __init__(self, words: Sequence[str]):
        self._words = ("", "\n", *words)
        self._ids = {word: i for i, word in enumerate(self._words)}
        self.vocab_size = len(self._words)

    def encode(self, text: str) -> np.ndarray:
        """One id a word; ValueError for one that is not known."""
        found = text.replace("\n", " \n ").split(" ")
        try:
            return np.array([self._ids[word] for word in found if word], np.int32)
        except KeyError as error:
            raise ValueError(f"{text!r} holds {error.args[0]!r}, which is no known word") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Words with a space between them; an id that is none becomes a replacement character."""
        return " ".join(self._words[i] if i < self.vocab_size else "\ufffd" for i in ids if i)


class HuggingFace:
    """A tokenizer.json file, with the names of its special tokens from tokenizer_config.json."""

    def __init__(self, file: Path):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("reading a tokenizer.json needs: pip install 'jaxlab[hf]'") from error
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from error
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        beside = _config(file)
        named = read_json(beside) if beside.is_file() else {}
        self.bos = self._special(named, "bos_token", BEGIN)
        self.eos = self._special(named, "eos_token", END)
        if named.get("add_bos_token") is False:
            self.bos = None

    def _special(self, config: dict, name: str, candidates) -> int | None:
        """The id of a special token; null in the configuration means that there is none."""
        if name in config and config[name] is None:
            return None
        named = config.get(name)
        named = named.get("content") if isinstance(named, dict) else named
        for token in (named,) if named else candidates:
            if (found := self._inner.token_to_id(token)) is not None:
                return found
        return None

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, no special tokens added."""
        return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text, special tokens left out."""
        return self._inner.decode([int(i) for i in ids])


def tokenizer_file(name: str) -> Path | None:
    """The file behind a tokenizer's name; None for 'bytes'."""
    if name == "bytes":
        return None
    path = Path(name)
    return path / "tokenizer.json" if path.is_dir() else path


def _config(file: Path) -> Path:
    """The file beside a tokenizer.json that names the tokens which begin and end a document."""
    return file.parent / "tokenizer_config.json"


def fingerprint(name: str) -> list[str]:
    """What the ids of a tokenizer depend on: hashes of its files, or ['bytes']."""
    file = tokenizer_file(name)
    if file is None:
        return [name]
    read = [f.read_bytes() if f.is_file() else b"" for f in (file, _config(file))]
    return [hashlib.sha256(content).hexdigest() for content in read]


def load_tokenizer(name: str) -> Tokenizer:
    """'bytes', a tokenizer.json or a folder that holds one; FileNotFoundError if there is none."""
    file = tokenizer_file(name)
    if file is None:
        return Bytes()
    if not file.is_file():
        raise FileNotFoundError(
            f"source.tokenizer={name!r}: no file {file}; give 'bytes', a tokenizer.json or its folder"
        )
    return HuggingFace(file)


class TokenRows:
    """What sources of rows of tokens share, beside the fields `tokenizer` and `seq_len`."""

    tokenizer: str
    seq_len: int

    def spec(self, batch: int):
        """Names, shapes and dtypes of a global batch."""
        from train.data.packing import batch_spec

        return batch_spec(batch, self.seq_len)

    def vocab_size(self) -> int | None:
        """Size of the vocabulary; None while the tokenizer's file is not there (planning)."""
        file = tokenizer_file(self.tokenizer)
        if file is not None and not file.is_file():
            return None
        return self.make_tokenizer().vocab_size

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer of the name; FileNotFoundError if there is none."""
        return load_tokenizer(self.tokenizer)
