"""Generation: prompts of unequal length in, tokens with their probabilities out; pure and jittable.

Prompts are padded on the right. Their tokens fill the first slots of the decoding state, made once
a prompt and then repeated for its samples; every step appends one slot to all rows alike. Positions
count a row's own tokens, so that padding changes nothing.
"""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab.sampling import PLAIN, Sampling, draw
from models.decoder import Decoder
from models.lora import LoraModule
from sharding.rules import constrain, current_rules, use_rules


class Generated(NamedTuple):
    """n continuations of each prompt; past the length, tokens are `pad` and numbers 0."""

    tokens: Int[Array, "b n t"]
    logprobs: Float[Array, "b n t"]  # under the model itself: temperature 1, no filter
    entropies: Float[Array, "b n t"]  # of the model's distribution, nats
    lengths: Int[Array, "b n"]  # tokens made, the stop token included
    done: Bool[Array, "b n"]  # ended by a stop token rather than for want of room
    sampling_logprobs: Float[Array, "b n t"]  # under the distribution that was drawn from


class Progress(NamedTuple):
    """Where decoding stands; the b * n rows keep the samples of a prompt together."""

    states: Any
    logits: Float[Array, "r v"]  # of the next token
    positions: Int[Array, "r"]  # of the next token
    keys: Key[Array, "b n"]
    made: Int[Array, ""]  # tokens made by every row
    done: Bool[Array, "r"]


def generate(
    module: Decoder | LoraModule,
    params,
    prompts: Int[Array, "b p"],
    lengths: Int[Array, "b"],
    key: Key[Array, "*b"],
    *,
    new: int,
    samples: int = 1,
    stop: tuple[int, ...] = (),
    sampling: Sampling = PLAIN,
    pad: int = 0,
) -> Generated:
    """At most `new` tokens after each prompt, `samples` times, one prefill a prompt.

    `lengths` are at least 1. A scalar `key` gives sample j of prompt i fold_in(fold_in(key, i), j);
    keys [b] stand for the fold with i, keys [b, samples] for both. So a continuation depends on its
    prompt and key alone, not on batch, padding or mesh. Generation ends when every row is done.
    ValueError for arguments that do not fit.
    """
    if new < 1:
        raise ValueError(f"new={new} must be at least 1")
    progress = prefill(
        module, params, prompts, lengths, key, room=prompts.shape[-1] + new, samples=samples
    )
    return decode(module, params, progress, steps=new, stop=stop, sampling=sampling, pad=pad)[1]


def prefill(
    module: Decoder | LoraModule,
    params,
    prompts: Int[Array, "b p"],
    lengths: Int[Array, "b"],
    key: Key[Array, "*b"],
    *,
    room: int,
    samples: int = 1,
) -> Progress:
    """Reads the prompts into a state with `room` for prompt and new tokens; arguments of `generate`."""
    if prompts.ndim != 2 or 0 in prompts.shape:
        raise ValueError(f"prompts must be [batch, length], none 0, got {prompts.shape}")
    b, p = prompts.shape
    if lengths.shape != (b,):
        raise ValueError(
            f"lengths must be {(b,)} as prompts are {prompts.shape}, got {lengths.shape}"
        )
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    if room <= p:
        raise ValueError(f"room={room} must exceed the prompts' length {p}")
    keys = _keys(key, b, samples)

    with _decoding_rules():
        place = jnp.arange(p)[None]
        real = (place < lengths[:, None]).astype(jnp.int32)
        states = _call(module, params, "init_state", b, room)
        positions = jnp.broadcast_to(place, prompts.shape)
        hidden, states = _call(module, params, "extend", prompts, states, positions, real)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], 1)[:, 0]
        repeat = lambda x: _constrain_rows(jnp.repeat(x, samples, 0))  # noqa: E731
        return Progress(
            _repeat_states(module, states, samples),
            repeat(_call(module, params, "logits", last)),
            repeat(lengths.astype(jnp.int32)),
            keys,
            jnp.zeros((), jnp.int32),
            jnp.zeros(b * samples, bool),
        )


def read(
    module: Decoder | LoraModule,
    params,
    progress: Progress,
    tokens: Int[Array, "r p"],
    lengths: Int[Array, "r"],
    *,
    made: int | Int[Array, ""],
) -> Progress:
    """Reads what follows in each row, right-padded to p slots: an agent's next observation.

    Rows of length 0 are done; the others go on from here, with the key of token number `made`. The rows
    must have been decoded with `leave_no_trace`.
    """
    rows, p = tokens.shape
    if lengths.shape != (rows,) or progress.positions.shape != (rows,):
        raise ValueError(
            f"tokens {tokens.shape} and lengths {lengths.shape} must have a row for each of the "
            f"{progress.positions.shape[0]} that are decoded"
        )
    with _decoding_rules():
        place = jnp.arange(p)[None]
        real = (place < lengths[:, None]).astype(jnp.int32)
        positions = progress.positions[:, None] + place
        hidden, states = _call(module, params, "extend", tokens, progress.states, positions, real)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        logits = _call(module, params, "logits", jnp.take_along_axis(hidden, last, 1)[:, 0])
        return Progress(
            states,
            _constrain_rows(logits),
            progress.positions + lengths,
            progress.keys,
            jnp.asarray(made, jnp.int32),
            lengths == 0,
        )


def decode(
    module: Decoder | LoraModule,
    params,
    progress: Progress,
    *,
    steps: int,
    stop: tuple[int, ...] = (),
    sampling: Sampling = PLAIN,
    pad: int = 0,
    leave_no_trace: bool = False,
) -> tuple[Progress, Generated]:
    """`steps` more tokens, fewer once every row is done; the room of the state must suffice.

    Calls in sequence make what one call of all the steps would, so text can be shown as it is made:
    donate `progress`. `Generated` holds the tokens of this call alone. `leave_no_trace`: what fills a
    row that is done enters neither its state nor its positions, so that `read` may follow.
    """
    sampling.check()
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    vocab = progress.logits.shape[-1]
    if strange := [token for token in stop if not 0 <= token < vocab]:
        raise ValueError(f"stop={strange} are no tokens of the model, which has {vocab}")
    keys, rows = progress.keys.reshape(-1), progress.logits.shape[0]

    def body(carry):
        i, at, out = carry
        drawn = draw(jax.vmap(jax.random.fold_in, (0, None))(keys, at.made), at.logits, sampling)
        live = ~at.done
        tokens = jnp.where(live, drawn.tokens, pad)
        numbers = (drawn.logprobs, drawn.entropies, drawn.sampling_logprobs)
        column = (tokens, *(jnp.where(live, x, 0) for x in numbers), live)
        out = [
            jax.lax.dynamic_update_slice_in_dim(old, new[:, None], i, 1)
            for old, new in zip(out, column, strict=True)
        ]
        stopped = jnp.isin(tokens, jnp.asarray(stop, jnp.int32)) if stop else False
        real = (live[:, None].astype(jnp.int32),) if leave_no_trace else ()
        hidden, states = _call(
            module, params, "extend", tokens[:, None], at.states, at.positions[:, None], *real
        )
        logits = _call(module, params, "logits", hidden[:, 0])
        after = Progress(
            states,
            _constrain_rows(logits),
            at.positions + (live if leave_no_trace else 1),
            at.keys,
            at.made + 1,
            at.done | (live & stopped),
        )
        return i + 1, after, out

    def going(carry):
        i, at, _ = carry
        return (i < steps) & ~jnp.all(at.done)

    with _decoding_rules():
        blank = [jnp.zeros((rows, steps), jnp.float32)] * 3
        out = [jnp.full((rows, steps), pad, jnp.int32), *blank, jnp.zeros((rows, steps), bool)]
        _, progress, out = jax.lax.while_loop(going, body, (jnp.int32(0), progress, out))
    tokens, logprobs, entropies, sampling_logprobs, live = (
        x.reshape(*progress.keys.shape, steps) for x in out
    )
    lengths = jnp.sum(live, -1, dtype=jnp.int32)
    done = progress.done.reshape(progress.keys.shape)
    return progress, Generated(tokens, logprobs, entropies, lengths, done, sampling_logprobs)


def _call(module: Decoder | LoraModule, params, method: str, *args) -> Any:
    return module.apply({"params": params}, *args, method=method)


def _keys(key: jax.Array, b: int, samples: int) -> Key[Array, "b n"]:
    if key.shape not in ((), (b,), (b, samples)):
        legal = f"(), {(b,)} or {(b, samples)}"
        raise ValueError(f"key must be one key or an array of them, shape {legal}, got {key.shape}")
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    if key.ndim == 0:
        key = fold(key, jnp.arange(b))
    if key.ndim == 1:
        key = jax.vmap(fold, (0, None))(key, jnp.arange(samples))
    return key


def _repeat_states(module: Decoder | LoraModule, states, samples: int):
    """Every row `samples` times; leaves are [batch, ...] or scalars, behind the layers if stacked."""
    axis = 0 if module.unrolled else 1

    def repeat(x):
        if x.ndim == axis:
            return x
        free = (P.UNCONSTRAINED,) * x.ndim
        return constrain(jnp.repeat(x, samples, axis), *free[:axis], "batch", *free[axis + 1 :])

    return states if samples == 1 else jax.tree.map(repeat, states)


def _constrain_rows(x: jax.Array) -> jax.Array:
    """`x` [rows, ...] split by rows as a batch is."""
    return constrain(x, "batch", *(None,) * (x.ndim - 1))


def _decoding_rules() -> contextlib.AbstractContextManager:
    """A step has a length of one: sequences are not split."""
    return use_rules({**current_rules(), "length": None})
