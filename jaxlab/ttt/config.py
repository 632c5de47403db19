"""What a TTT layer learns at test time, and how: fast weights, inner configuration, the ladder."""

import dataclasses
from typing import Annotated, Literal, NamedTuple

from jaxtyping import Array, Float

from jaxlab.arguments import check_choice, check_count

NAMES = ("w0", "w1", "w2")


class FastWeights(NamedTuple):
    """Initial weights of the inner net, rows (f(x) = x w), per head or per sequence and head.

    w0, w2 map Dk to Dh and w1 maps Dh to Dv; for net="linear" w1 maps Dk to Dv, the others are
    ignored and may be None.
    """

    w0: Float[Array, "*b h k c"] | None
    w1: Float[Array, "*b h c v"]
    w2: Float[Array, "*b h k c"] | None


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """The inner optimisation: net, loss, which matrices move, in which chunks and by which rule.

    Defaults are the language-model operator of LaCT (2505.23884). Hashable, so static under jit;
    ValueError on construction for any other value. Which combinations an
    implementation can compute is checked by the function called.
    """

    net: Annotated[Literal["swiglu", "linear"], "(silu(x w0) * (x w2)) w1, or x w1"] = "swiglu"
    loss: Annotated[Literal["dot", "squared"], "-<f(k), v>, or |f(k) - v|^2 / 2"] = "dot"
    update: Annotated[tuple[str, ...], "matrices that move; any iterable of names"] = NAMES
    visibility: Annotated[
        Literal["exclusive", "inclusive_chunk", "token"],
        "a chunk reads, then learns; learns, then reads; or token by token",
    ] = "exclusive"
    chunk_size: Annotated[int, "tokens a chunk: part of the model, except for token"] = 2048
    steps: Annotated[int, "inner steps on a chunk"] = 1
    token_rates: Annotated[bool, "false: rates are ignored, all are 1"] = True
    momentum: Annotated[bool, "false: the momentum gates are ignored"] = True
    orthogonalize: Annotated[
        Literal["lact", "muon"] | None, "coefficients of Newton-Schulz; none: do not"
    ] = "lact"
    ns_steps: Annotated[int, "of Newton-Schulz; at most 5 for lact"] = 5
    weight_norm: Annotated[Literal["post", "pre"] | None, "norms kept after or before the sum"] = (
        "post"
    )
    detach_norm: Annotated[bool, "no gradient through the norms of the initial weights"] = False
    sign: Annotated[int, "1: descent, -1: ascent"] = 1
    query: Annotated[Literal["q", "k"], "what the read-out uses"] = "q"

    def __post_init__(self):
        try:
            names = tuple(self.update)
        except TypeError as error:
            raise ValueError(f"update={self.update!r} must be names among {NAMES}") from error
        for name in names:
            check_choice("each name in update", name, *NAMES)
        # One order, so that equal sets are equal (and equally hashed) configurations.
        moving = tuple(name for name in NAMES if name in names)
        check_choice("net", self.net, "swiglu", "linear")
        check_choice("loss", self.loss, "dot", "squared")
        check_choice("visibility", self.visibility, "exclusive", "inclusive_chunk", "token")
        check_choice("orthogonalize", self.orthogonalize, "lact", "muon", None)
        check_choice("weight_norm", self.weight_norm, "post", "pre", None)
        check_choice("query", self.query, "q", "k")
        for name in ("token_rates", "momentum", "detach_norm"):
            check_choice(name, getattr(self, name), True, False)
        if self.sign not in (1, -1):
            raise ValueError(f"sign={self.sign!r} must be +1 (descent) or -1 (ascent)")
        numbers = {
            "chunk_size": check_count("chunk_size", self.chunk_size, 1),
            "steps": check_count("steps", self.steps, 1),
            "ns_steps": check_count("ns_steps", self.ns_steps, 0),
        }
        if self.orthogonalize == "lact" and self.ns_steps > 5:
            raise ValueError(f"ns_steps={self.ns_steps} must be at most 5 for orthogonalize='lact'")
        for name, value in {"update": moving, "sign": int(self.sign), **numbers}.items():
            object.__setattr__(self, name, value)

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the matrices that the net has and that move."""
        return tuple(name for name in self.update if name == "w1" or self.net == "swiglu")


def _ladder() -> dict[str, InnerConfig]:
    base = InnerConfig()
    v1 = dataclasses.replace(base, update=("w1",))
    v2 = dataclasses.replace(v1, weight_norm=None)
    v3 = dataclasses.replace(v2, net="linear")
    v4 = dataclasses.replace(v3, token_rates=False)
    v5 = dataclasses.replace(v4, momentum=False)
    v6 = dataclasses.replace(v5, orthogonalize=None)
    v1p = dataclasses.replace(v1, weight_norm="pre")
    return {"base": base, "V1": v1, "V1p": v1p, "V2": v2, "V3": v3, "V4": v4, "V5": v5, "V6": v6}


# From LaCT to linear attention, each variant keeping the changes before it (2602.21204, section 5);
# V1p, V1 normalised at the read-out, is beside the chain.
LADDER: dict[str, InnerConfig] = _ladder()
