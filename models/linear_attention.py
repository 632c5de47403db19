"""Layers whose state is a matrix a head: linear attention with decay, GLA, and the delta rules."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlab.linear_attention import LinAttnState, init_state
from models.layers import RMSNorm, SequenceLayer, constant, linear
from sharding.context.linear import RECURRENCES, context_recurrence
from sharding.rules import constrain


class Kind(NamedTuple):
    """A method of sharding.context.linear and the gates it takes."""

    method: str
    decay: str | None  # "head": a log decay for each head, "channel": for each of its channels
    beta: bool  # the delta rule, with its rate


KINDS: dict[str, Kind] = {
    "linear_attention": Kind("linear_attention", "head", False),
    "gla": Kind("gla", "channel", False),
    "delta": Kind("delta_rule", None, True),
    "gated_delta": Kind("gated_delta_rule", "head", True),
    "kda": Kind("kda", "channel", True),
}


class LinearAttentionLayer(SequenceLayer):
    """y = (RMSNorm(method(q, k, v, gates)) * silu(x Wg)) Wo, a head at a time.

    `kind` is a name in KINDS. Keys and queries of the delta rules are silu and of length one; log
    decays are log sigmoid(x W + b) / 16, betas sigmoid(x W + b). ValueError for another kind or sizes
    below 1. Computed in `dtype`, the state in float32.
    Sources: GLA, 2312.06635, section 4.4; Gated DeltaNet, 2412.06464, section 3.4.
    """

    hidden_size: int
    num_heads: int
    head_dim: int
    kind: str = "linear_attention"
    chunk_size: int = 64
    depth: int = 1  # layers of the whole network: the output starts the smaller
    dtype: str = "float32"
    param_dtype: str = "float32"

    def check(self) -> None:
        """ValueError for values that do not fit, naming the field."""
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be one of {list(KINDS)}")
        for name in ("num_heads", "head_dim", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def init_state(self, batch: int, length: int) -> LinAttnState:
        """The state before the first token: zeros of constant size."""
        return init_state(batch, self.num_heads, self.head_dim, self.head_dim)

    @nn.compact
    def mix(
        self, x, positions, segment_ids, inv_freq, state: LinAttnState | None = None
    ) -> tuple[jax.Array, LinAttnState | None]:
        """A mixer of models/layers.py; it knows order without positions."""
        self.check()
        kind, (c, h, k) = KINDS[self.kind], (self.hidden_size, self.num_heads, self.head_dim)
        x = x.astype(self.dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))

        def project(name: str) -> jax.Array:
            axes = ("embed", "heads", "head_dim")
            return linear(self, name, (c, h, k), axes, c**-0.5, self.param_dtype)(x)

        def gate(name: str, shape: tuple[int, ...], start: float) -> jax.Array:
            axes = ("embed", "heads", "head_dim")[: 1 + len(shape)]
            w = linear(self, f"w_{name}", (c, *shape), axes, c**-0.5, self.param_dtype)(wide)
            return w + constant(self, f"b_{name}", shape, start, self.param_dtype)

        q, key, v = (project(name) for name in ("wq", "wk", "wv"))
        gates = {}
        if kind.decay is not None:
            shape = (h,) if kind.decay == "head" else (h, k)
            gates["log_decay"] = jax.nn.log_sigmoid(gate("decay", shape, 2.0)) / 16
        if kind.beta:
            q, key = (_unit(jax.nn.silu(y)) for y in (q, key))
            gates["beta"] = jax.nn.sigmoid(gate("beta", (h,), 0.0))
        q = constrain(q, "batch", "length", "act_heads", None)
        if state is None and not self.is_initializing():
            out, _ = context_recurrence(
                kind.method, q, key, v, **gates, segment_ids=segment_ids,
                chunk_size=self.chunk_size, return_state=False,
            )  # fmt: skip
        else:  # one device's length: of a state, or of the row with which parameters are made
            if segment_ids is not None:  # padding neither writes nor decays
                real = segment_ids != 0
                zero = lambda y: jnp.where(real.reshape(*real.shape, *(1,) * (y.ndim - 2)), y, 0)  # noqa: E731
                key, v, gates = jax.tree.map(zero, (key, v, gates))
            run, _ = RECURRENCES[kind.method]
            impl = "recurrent" if x.shape[1] == 1 else "chunkwise"
            out, state = run(
                q, key, v, **gates, initial_state=state, impl=impl, chunk_size=self.chunk_size,
                return_state=state is not None,
            )  # fmt: skip
        out = RMSNorm(1e-6, self.param_dtype, name="out_norm")(out)
        out = out * jax.nn.silu(project("w_gate"))
        std = (2 * self.depth * h * k) ** -0.5
        axes = ("heads", "head_dim", "embed")
        product = linear(self, "wo", (h, k, c), axes, std, self.param_dtype, 2)
        return product(out), state


def _unit(x: jax.Array) -> jax.Array:
    """Of length one over the last axis; zero stays zero."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6)
