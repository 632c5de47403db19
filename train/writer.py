"""Text in, text out: prompts are continued and their text handed over as it is made."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxlab.sampling import Sampling
from models.decoder import Decoder
from models.generate import decode, prefill
from models.lora import LoraModule
from sharding.rules import constrain
from train.data.tokenizers import Tokenizer

UNFINISHED = "\ufffd"  # what decoding makes of a part of a character


class Detokenizer:
    """Text of one row of tokens as they come: whole characters only, nothing from a stop text on."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop, self._ids = tokenizer, tuple(stop), list(prompt)
        # Ids from _from on are decoded together, for some tokens depend on the one before (spaces);
        # the text up to _read has been taken.
        self._from, self._read = max(0, len(self._ids) - 4), len(self._ids)
        self._held = ""
        self.ended = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain with these tokens."""
        for token in ids:
            if token < self._tokenizer.vocab_size:
                self._ids.append(int(token))
                text = self._tail()
                if not text.endswith(UNFINISHED):
                    self._take(text)
        return self._release(final=False)

    def finish(self) -> str:
        """The rest of the text, halves of characters as replacement characters."""
        self._take(self._tail())
        text = self._release(final=True)
        self.ended = True
        return text

    def _tail(self) -> str:
        before = self._tokenizer.decode(self._ids[self._from : self._read])
        return self._tokenizer.decode(self._ids[self._from :])[len(before) :]

    def _take(self, text: str) -> None:
        self._held += text
        self._from, self._read = self._read, len(self._ids)

    def _release(self, final: bool) -> str:
        if self.ended:
            return ""
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.ended = True
            return self._held[: min(found)]
        # The end may be the beginning of a stop text.
        keep = 0 if final else max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Writer:
    """Continues the same prompts again and again; compiled once. The tokenizer's `eos` and `ends` end
    a row.

    Rows are the samples of the first prompt, then those of the second... ValueError for a prompt
    without tokens.
    """

    def __init__(
        self,
        module: Decoder | LoraModule,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        *,
        tokens: int,
        samples: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        ends: Sequence[int] = (),
        piece: int,
    ):
        bos = [] if tokenizer.bos is None else [tokenizer.bos]
        self._ids = [[*bos, *map(int, tokenizer.encode(text))] for text in prompts]
        for text, ids in zip(prompts, self._ids, strict=True):
            if not ids:
                raise ValueError(f"prompt {text!r} has no tokens")
        self._lengths = np.array([len(ids) for ids in self._ids], np.int32)
        self._prompts = np.zeros((len(prompts), max(self._lengths)), np.int32)
        for row, ids in zip(self._prompts, self._ids, strict=True):
            row[: len(ids)] = ids
        self._tokenizer, self._stop, self._samples = tokenizer, stop, samples
        self._tokens, piece = tokens, min(piece, tokens)
        self._pieces = -(-tokens // piece)
        room = self._prompts.shape[1] + self._pieces * piece
        end = tuple({*ends} if tokenizer.eos is None else {*ends, tokenizer.eos})
        self._prefill = jax.jit(functools.partial(prefill, module, room=room, samples=samples))

        def step(params, progress):
            progress, made = decode(
                module, params, progress, steps=piece, stop=end, sampling=sampling
            )
            # Every process prints or waits for the same tokens.
            return progress, constrain(made.tokens, None, None, None), made.lengths, made.done

        self._step = jax.jit(step, donate_argnums=1)

    def write(self, params, key: jax.Array) -> Iterator[tuple[int, str, bool]]:
        """(row, more of its text, whether the row is complete), as it is made."""
        rows = [
            Detokenizer(self._tokenizer, ids, self._stop)
            for ids in self._ids
            for _ in range(self._samples)
        ]
        progress, made = self._prefill(params, self._prompts, self._lengths, key), 0
        for number in range(self._pieces):
            progress, *out = self._step(params, progress)
            tokens, lengths, done = (np.asarray(x).reshape(len(rows), -1) for x in out)
            allowed = min(tokens.shape[1], self._tokens - made)
            made += allowed
            for i, row in enumerate(rows):
                if row.ended:
                    continue
                length = int(lengths[i, 0])
                last = bool(done[i, 0]) and length <= allowed
                # The stop token has no text.
                text = row.push(tokens[i, : min(length - last, allowed)].tolist())
                if not row.ended and (last or number == self._pieces - 1):
                    text += row.finish()
                if text or row.ended:
                    yield i, text, row.ended
            if all(row.ended for row in rows):
                return
