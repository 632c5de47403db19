"""Token-causal TTT: with a static kernel and a plain sum it is linear attention on the features."""

import jax
import jax.numpy as jnp

from jaxlab.linear_attention import LinAttnState, linear_attention
from jaxlab.ttt.config import InnerConfig
from jaxlab.ttt.net import features
from jaxlab.ttt.state import TTTState

# The computation form of jaxlab.linear_attention behind each `impl` of ttt.
FORMS = {"auto": "chunkwise", "recurrent": "recurrent", "parallel": "scan"}


def why_not_token(cfg: InnerConfig) -> str | None:
    """Why visibility "token" cannot have this configuration, or None if it can."""
    if cfg.moving != ("w1",) or cfg.loss != "dot":
        return f"it needs update=('w1',) and loss='dot'; got {cfg.update} and {cfg.loss!r}"
    if cfg.steps > 1 or cfg.weight_norm is not None or cfg.orthogonalize is not None:
        return (
            "it needs steps=1, weight_norm=None and orthogonalize=None; "
            f"got {cfg.steps}, {cfg.weight_norm!r}, {cfg.orthogonalize!r}"
        )
    return None


def token_causal(
    impl: str, cfg: InnerConfig, state: TTTState, q, k, v, rates, momentum
) -> tuple[jax.Array, TTTState]:
    """(outputs, state) of tokens [b, t, h, ...] that each read the state after their own write.

    Here the momentum buffer is that of `linear_attention`: it includes the sign, and changes at
    every token, so that a run may be continued anywhere.
    """
    rate = rates if rates is None else cfg.sign * rates[..., 1]
    if rate is None and cfg.sign < 0:
        rate = -jnp.ones_like(v[..., 0])
    fw = state.fw
    phi = lambda x: jnp.swapaxes(features(cfg.net, fw, jnp.swapaxes(x, 1, 2)), 1, 2)  # noqa: E731
    buffer = None if momentum is None or state.delta is None else state.delta["w1"]
    out, after = linear_attention(
        phi(q), phi(k), v, momentum=momentum, rate_in=rate, scale=1.0,
        initial_state=LinAttnState(S=fw.w1, M=buffer), impl=FORMS[impl],
    )  # fmt: skip
    assert after is not None  # return_state is True
    delta = state.delta if momentum is None else {"w1": after.M}
    return out, state._replace(fw=fw._replace(w1=after.S), delta=delta)
