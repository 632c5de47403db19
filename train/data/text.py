"""Text as a source of batches: which files, which tokenizer, how packed."""

import dataclasses
from typing import Annotated, Literal

from train.data.tokenizers import TokenRows
from train.data.tokenizers import load_tokenizer as load_tokenizer

PACKING = ("concat", "first_fit")


@dataclasses.dataclass(frozen=True)
class Text(TokenRows):
    """Next-token batches of files of text, documents kept apart by segment ids."""

    files: Annotated[
        tuple[str, ...], "paths, globs or folders: .txt .md .rst .jsonl .parquet .array_record"
    ] = ("builtin:pydoc",)
    weights: Annotated[tuple[float, ...], "rows drawn from each of files; (): by size"] = ()
    tokenizer: Annotated[str, "'bytes', a tokenizer.json or its folder"] = "bytes"
    column: Annotated[str, "of JSON lines and Parquet rows"] = "text"
    seq_len: Annotated[int, "tokens a row"] = 256
    packing: Annotated[
        Literal["concat", "first_fit"],
        "concat resumes on any number of hosts; first_fit wastes less",
    ] = "concat"
    valid_fraction: Annotated[float, "of the documents held out for evaluation"] = 0.1
    cache_dir: Annotated[
        str, "keeps tokenised text, memory-mapped; '': ~/.cache/jaxlab above 64 MiB, else memory"
    ] = ""

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work; reads no file."""
        if not self.files or not all(self.files):
            raise ValueError(f"source.files={list(self.files)} must name at least one file")
        if self.weights and len(self.weights) != len(self.files):
            raise ValueError(
                f"source.weights={list(self.weights)} must have one weight for each of "
                f"source.files={list(self.files)}"
            )
        if any(not 0 < w < float("inf") for w in self.weights):
            raise ValueError(f"source.weights={list(self.weights)} must be positive numbers")
        if self.seq_len < 1:
            raise ValueError(f"source.seq_len={self.seq_len} must be at least 1")
        ring, context = mesh_sizes.get("ring", 1), mesh_sizes.get("context", 1)
        if self.seq_len % (ring * context):
            raise ValueError(
                f"source.seq_len={self.seq_len} is not divisible by mesh.ring={ring} * "
                f"mesh.context={context}; use a multiple of {ring * context}"
            )
        if self.packing not in PACKING:
            raise ValueError(f"source.packing={self.packing!r} must be one of {list(PACKING)}")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"source.valid_fraction={self.valid_fraction} must be between 0 and 1")

    def make(
        self, batch: int, *, seed: int, split: str, process_index: int = 0, process_count: int = 1
    ):
        """`Rows`, or a `Stream` for first-fit training batches, of a split ('train' or 'valid').

        FileNotFoundError or ValueError, naming file and line, for data that cannot be used.
        """
        from train.data.corpus import load_corpus
        from train.data.packing import Rows, Stream, Windows

        self.check({})
        groups = [(f,) for f in self.files] if self.weights else [self.files]
        whole = [load_corpus(g, self.tokenizer, self.column, self.cache_dir) for g in groups]
        parts = [c.split(self.valid_fraction, split) for c in whole]
        for group, part in zip(groups, parts, strict=True):
            if split == "train" and part.tokens <= self.seq_len:
                raise ValueError(
                    f"source.files={list(group)} hold {part.tokens} training tokens, fewer than a "
                    f"row: use source.seq_len <= {max(part.tokens - 1, 1)} or more text"
                )
        weights = self.weights or None
        if split == "train" and self.packing == "first_fit":
            return Stream(parts, weights, self.seq_len, batch, seed, process_index, process_count)
        import numpy as np

        train = split == "train"
        windows = []
        for i, part in enumerate(parts):
            rng = np.random.default_rng([seed, i])
            order = rng.permutation(len(part.spans)) if train else None
            windows.append(Windows(part, self.seq_len, order))
        return Rows(windows, weights, batch, seed, shuffle=train)
