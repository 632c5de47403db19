"""Decoder-only language model: Llama 3 and Qwen 3 dense shapes by configuration."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlab.rope import LinearScaling, Llama3Scaling, YarnScaling, rope_frequencies
from models.layers import MLP, RMSNorm, compute_dtype, weight
from models.mixers import MIXERS, TTT, LaCT, LinearAttention, check_chunks_of, check_mixers
from models.remat import REMAT
from sharding.context import ContextConfig, check_context, zigzag_permutation
from sharding.context.checks import TWO_LEVEL, check_names
from sharding.context.cores import check_core
from sharding.rules import constrain


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder LM. Defaults are the demo's: 0.8 M parameters, byte vocabulary."""

    vocab: Annotated[int, "vocabulary size; at least the tokenizer's"] = 256
    layers: Annotated[int, "number of blocks"] = 4
    d_model: Annotated[int, "width of the residual stream"] = 128
    heads: Annotated[int, "query heads"] = 4
    kv_heads: Annotated[int, "key/value heads; divides heads"] = 4
    head_dim: Annotated[int, "size of a head"] = 32
    mlp: Annotated[int, "hidden width of the SwiGLU"] = 384
    pattern: Annotated[tuple[str, ...], "mixers of consecutive layers, repeated"] = ("attention",)
    lact: LaCT = LaCT()
    ttt: TTT = TTT()
    linear: LinearAttention = LinearAttention()
    context: ContextConfig = ContextConfig()
    mlp_tiles: Annotated[int, "sequence tiles of the MLP; more tiles, less memory"] = 1
    qk_norm: Annotated[bool, "RMSNorm on queries and keys (Qwen 3)"] = False
    tied: Annotated[bool, "share the input and output embedding"] = False
    value_head: Annotated[bool, "a number a token too: the value network of PPO"] = False
    rope_theta: Annotated[float, "base of the rotary frequencies"] = 10_000.0
    rope_scaling: Annotated[
        LinearScaling | Llama3Scaling | YarnScaling | None, "how positions are stretched"
    ] = None
    norm_eps: Annotated[float, "epsilon of RMSNorm"] = 1e-6
    dropout: Annotated[float, "rate after the mixer and the MLP of every layer, in training"] = 0.0
    remat: Annotated[
        Literal["none", "full", "dots", "attention", "attn_y", "offload", "offload_input"],
        "what the backward keeps",
    ] = "none"
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "compute type; auto: f32 on CPU"] = (
        "auto"
    )
    param_dtype: Annotated[Literal["float32", "bfloat16"], "type of the parameters"] = "float32"

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError for shapes that cannot be built, naming the field and what is allowed."""
        sizes = "vocab layers d_model heads kv_heads head_dim mlp mlp_tiles"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if not 1 < self.rope_theta < float("inf"):
            raise ValueError(f"model.rope_theta={self.rope_theta} must be finite and above 1")
        if not 0 < self.norm_eps < float("inf"):
            raise ValueError(f"model.norm_eps={self.norm_eps} must be finite and above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be in [0, 1)")
        if self.heads % self.kv_heads:
            legal = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ValueError(
                f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}: use {legal}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even (rotary positions)")
        if not self.pattern or self.layers % len(self.pattern):
            raise ValueError(
                f"model.layers={self.layers} must be a multiple of the {len(self.pattern)} entries "
                f"of model.pattern={self.pattern}"
            )
        check_mixers(self)
        tensor = mesh_sizes.get("tensor", 1)
        for name in ("heads", "kv_heads"):
            if getattr(self, name) % tensor:
                size, both = getattr(self, name), math.gcd(self.heads, self.kv_heads)
                legal = [n for n in range(1, both + 1) if both % n == 0]
                raise ValueError(
                    f"model.{name}={size} is not divisible by mesh.tensor={tensor}; "
                    f"use mesh.tensor in {legal}"
                )

    def order(
        self, mesh_sizes: dict[str, int], length: int, platform: str = "", packed: bool = True
    ) -> np.ndarray | None:
        """The natural index of the token that goes to each place of a row; None: natural order.

        ValueError for a method, or tiles, that `length` tokens on this mesh cannot have, and for a
        kernel that they cannot have on `platform`, if it is given; `packed`: with segment ids.
        """
        c, sizes = self.context, mesh_sizes
        ring, context = sizes.get("ring", 1), sizes.get("context", 1)
        try:
            check_names(c.method, c.layout, c.core, c.stage_policy)
            check_context(
                sizes, method=c.method, num_heads=self.heads, num_kv_heads=self.kv_heads,
                seq_len=length, batch=sizes.get("data", 1) * sizes.get("fsdp", 1),
                heads_per_stage=c.heads_per_stage, layout=c.layout,
            )  # fmt: skip
            if "attention" in self.pattern:
                check_core(
                    sizes, platform, method=c.method, core=c.core, stage_policy=c.stage_policy,
                    seq_len=length, head_dim=self.head_dim, packed=packed,
                    dtype=compute_dtype(self.dtype, platform),
                )  # fmt: skip
        except ValueError as error:
            of_field = str(error).partition("=")[0] in vars(c)
            where = "" if of_field else f"method={c.method!r}: "
            raise ValueError(f"model.context.{where}{error}") from error
        if length % (self.mlp_tiles * ring * context):
            raise ValueError(
                f"model.mlp_tiles={self.mlp_tiles} must divide the {length // (ring * context)} "
                f"tokens of a device (source.seq_len={length} over mesh.ring={ring} * "
                f"mesh.context={context})"
            )
        check_chunks_of(self, length, ring * context)
        if c.layout == "contiguous":
            return None
        others = sorted(set(self.pattern) - {"attention"})
        if others:
            raise ValueError(
                f"model.context.layout={c.layout!r} takes tokens out of their order, which "
                f"{', '.join(others)} of model.pattern need: use 'contiguous'"
            )
        return zigzag_permutation(length, ring if c.method in TWO_LEVEL else context)

    def inputs(self, batch: dict[str, jax.ShapeDtypeStruct]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What `init` is traced with, one row of a batch of this kind."""
        tokens = batch["tokens"]
        return (jax.ShapeDtypeStruct((1, *tokens.shape[1:]), tokens.dtype),)

    def build(self, platform: str) -> "Decoder":
        """The module, with `dtype='auto'` settled for `platform` (cpu, gpu, tpu)."""
        return Decoder(dataclasses.replace(self, dtype=compute_dtype(self.dtype, platform)))


class Block(nn.Module):
    """Pre-norm residual layers, one per entry of `config.pattern`; an rng "dropout" turns dropout on."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, states, positions, segment_ids, inv_freq):
        c = self.config
        norm = lambda name: RMSNorm(c.norm_eps, c.param_dtype, name=name)  # noqa: E731
        drop = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        states = list(states)
        for i, mixer in enumerate(c.pattern):
            x = checkpoint_name(constrain(x, "batch", "length", "act_embed"), "blk_in")
            mix = MIXERS[mixer](c, name=f"mixer_{i}")
            y = norm(f"mixer_norm_{i}")(x)
            y, states[i] = mix.mix(y, positions, segment_ids, inv_freq, states[i])
            x = x + drop(y)
            tiles = c.mlp_tiles if states[i] is None else 1
            x = x + drop(MLP(c, name=f"mlp_{i}")(x, norm(f"mlp_norm_{i}"), tiles))
        return x, tuple(states)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and output head; `hidden` and `unembedding` apart, so that an
    objective can compute its loss without [tokens, vocab] in memory.

    Blocks are scanned over stacked parameters. `unrolled` is the same network as a loop over the
    parameters of `unroll`: more to compile, nothing to copy out of a stack at every step.
    """

    config: DecoderConfig
    unrolled: bool = False

    def setup(self):
        c = self.config
        shape = (c.vocab, c.d_model)
        self.embedding = weight(
            self, "embedding", shape, ("vocab_in", None), c.d_model**-0.5, c.param_dtype
        )
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT[c.remat], prevent_cse=False)
        if self.unrolled:
            self.blocks: Any = [block(c) for _ in range(self.depth)]
        else:
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, *(nn.broadcast,) * 3),  # pyright: ignore[reportArgumentType]
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c)
        self.norm = RMSNorm(c.norm_eps, c.param_dtype)
        if not c.tied:
            shape = (c.d_model, c.vocab)
            std = c.d_model**-0.5
            self.head = weight(self, "head", shape, ("embed", "vocab"), std, c.param_dtype)
        if c.value_head:  # zeros: nothing is expected before it has learnt
            self.value = weight(self, "value", (c.d_model,), ("embed",), 0.0, c.param_dtype)

    @property
    def depth(self) -> int:
        """Number of blocks, each of as many layers as the pattern has entries."""
        return self.config.layers // len(self.config.pattern)

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Final normalised activations, in the compute type.

        With `config.context.layout` 'zigzag' tokens come in the order of `DecoderConfig.order`, and
        positions must be given.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        nothing = (None,) * len(self.config.pattern)
        states = [nothing] * self.depth if self.unrolled else nothing
        return self.extend(tokens, states, positions, segment_ids)[0]

    def init_state(self, batch: int, length: int):
        """The state of decoding before the first token: one pytree a block, stacked if scanned."""
        c = self.config
        block = tuple(MIXERS[m](c, parent=None).init_state(batch, length) for m in c.pattern)
        if self.unrolled:
            return [block] * self.depth
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.depth, *x.shape)), block)

    def extend(
        self,
        tokens: Int[Array, "b t"],
        states,
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """`hidden` of tokens that follow those in `states`, and the states with them.

        With states, segment 0 is padding and any other id a token; see models.layers.
        """
        c = self.config
        inv_freq = jnp.asarray(rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        x = self.embedding.astype(c.dtype)[tokens]
        if self.unrolled:
            after = []
            for block, state in zip(self.blocks, states, strict=True):
                x, state = block(x, state, positions, segment_ids, inv_freq)
                after.append(state)
        else:
            x, after = self.blocks(x, states, positions, segment_ids, inv_freq)
        return self.norm(x), after

    def unembedding(self) -> Float[Array, "d v"]:
        """Output matrix: logits = hidden @ unembedding."""
        return (self.embedding.T if self.config.tied else self.head).astype(self.config.dtype)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits in float32."""
        return jnp.einsum(
            "...d,dv->...v", hidden, self.unembedding(), preferred_element_type=jnp.float32
        )

    def values(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b"]:
        """What the value head says at each token, in float32."""
        return jnp.einsum("...d,d->...", hidden, self.value, preferred_element_type=jnp.float32)

    def __call__(self, tokens, positions=None, segment_ids=None) -> Float[Array, "b t v"]:
        """Logits in float32."""
        return self.logits(self.hidden(tokens, positions, segment_ids))


def unroll(module: Decoder, params) -> tuple[Decoder, Any]:
    """The unrolled decoder and its parameters, to decode with: blocks apart, in the compute type.

    Numbers are the same, as layers convert their weights, except the scales of norms, anyway. It is
    one pass over the parameters: do it once, outside of a loop over calls.
    """

    def convert(path, x):
        return x if path[-1].key == "scale" else x.astype(module.config.dtype)

    params = jax.tree_util.tree_map_with_path(convert, params)
    rest = {name: value for name, value in params.items() if name != "blocks"}
    blocks = {
        f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], params["blocks"])
        for i in range(module.depth)
    }
    return module.clone(unrolled=True), rest | blocks
