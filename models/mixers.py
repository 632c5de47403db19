"""The mixers of a decoder by the names that `model.pattern` uses, and their settings."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from jaxlab.ttt import InnerConfig
from models.lact import LaCTLayer
from models.layers import Attention
from models.linear_attention import KINDS, LinearAttentionLayer
from models.ttt import TTTLayer
from sharding.context.ttt import check_chunks


@dataclasses.dataclass(frozen=True)
class LaCT:
    """Mixer "lact"; its attention has the heads of the model, each of d_model / heads."""

    heads: Annotated[int, "fast-weight heads; divides d_model"] = 2
    inter_multi: Annotated[int, "hidden width of the inner net over its input"] = 1
    window: Annotated[int, "tokens that attention sees"] = 64
    inner: InnerConfig = InnerConfig(chunk_size=64)
    low_rank: Annotated[int | None, "rank of the initial w0 and w2; none: whole"] = None
    rope_theta: Annotated[float, "base of the rotary frequencies"] = 1e6
    base_rate: Annotated[float, "inner learning rate at the start"] = 1e-3


@dataclasses.dataclass(frozen=True)
class TTT:
    """Mixers "ttt_linear" and "ttt_mlp", with the heads of the model, each of d_model / heads."""

    chunk_size: Annotated[int, "tokens of a mini-batch"] = 16
    base_rate: Annotated[float, "inner learning rate"] = 1.0
    gate: Annotated[bool, "gate the output"] = False


@dataclasses.dataclass(frozen=True)
class LinearAttention:
    """Mixers "linear_attention", "gla", "delta", "gated_delta" and "kda", with the heads of the model."""

    chunk_size: Annotated[int, "tokens of a chunk: speed, not numbers"] = 64


def _common(c) -> dict[str, Any]:
    """The fields that every layer takes from a decoder's configuration."""
    return dict(hidden_size=c.d_model, depth=c.layers, dtype=c.dtype, param_dtype=c.param_dtype)


def _lact(c, **how) -> LaCTLayer:
    s = c.lact
    return LaCTLayer(
        attn_heads=c.heads, ttt_heads=s.heads, inter_multi=s.inter_multi, window=s.window,
        inner=s.inner, low_rank=s.low_rank, qk_norm=c.qk_norm, rope_theta=s.rope_theta,
        base_rate=s.base_rate, core=c.context.core, **_common(c), **how,
    )  # fmt: skip


def _ttt(kind: str) -> Callable[..., TTTLayer]:
    def make(c, **how):
        s = c.ttt
        return TTTLayer(
            kind, num_heads=c.heads, chunk_size=s.chunk_size, base_rate=s.base_rate,
            use_gate=s.gate, **_common(c), **how,
        )  # fmt: skip

    return make


def _linear(kind: str) -> Callable[..., LinearAttentionLayer]:
    def make(c, **how):
        return LinearAttentionLayer(
            num_heads=c.heads, head_dim=c.head_dim, kind=kind, chunk_size=c.linear.chunk_size,
            **_common(c), **how,
        )  # fmt: skip

    return make


# Functions of (DecoderConfig, name=... or parent=None) that make a module.
MIXERS: dict[str, Callable[..., Any]] = {
    "attention": Attention,
    "lact": _lact,
    "ttt_linear": _ttt("linear"),
    "ttt_mlp": _ttt("mlp"),
    **{kind: _linear(kind) for kind in KINDS},
}


def check_mixers(config) -> None:
    """ValueError for a pattern or settings that a decoder cannot have, naming the field of the model."""
    for name in config.pattern:
        if name not in MIXERS:
            raise ValueError(f"model.pattern has {name!r}; allowed are {sorted(MIXERS)}")
        module = MIXERS[name](config, parent=None)
        if hasattr(module, "check"):
            try:
                module.check()
            except ValueError as error:
                raise ValueError(f"model.pattern has {name!r}, for which {error}") from None
    inner = config.lact.inner
    if "lact" in config.pattern and (inner.visibility != "exclusive" or inner.steps > 1):
        raise ValueError(
            f"model.lact.inner.visibility={inner.visibility!r} and steps={inner.steps}: a language "
            "model needs 'exclusive' and 1"
        )


def check_chunks_of(config, length: int, shards: int) -> None:
    """ValueError, naming the field, unless rows of `length` tokens on `shards` devices suit the mixers."""
    if "lact" in config.pattern and shards > 1:
        try:
            check_chunks(length, shards, config.lact.inner.chunk_size, spread=True)
        except ValueError as error:
            raise ValueError(f"model.lact.inner: {error}") from None
