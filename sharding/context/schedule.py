"""Which heads a device works on in which stage: UPipe's schedule of grouped queries.

A stage holds `heads_per_stage` query heads over all devices. A chunk of key/value heads is sent once
and read by the `n_inner` stages that follow, so that keys and values travel as in plain Ulysses.
Source: UPipe (arXiv 2602.21196); papers' note on it, section 2.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class HeadSchedule:
    """n_outer chunks of `ukv` key/value heads, each read by n_inner stages of `heads_per_stage` heads.

    Key/value heads are repeated `rep` times where there are fewer than devices: `he` effective heads
    then, each read by `ge` query heads, `gt` of them in a stage.
    """

    num_heads: int
    num_kv_heads: int
    cp_size: int
    heads_per_stage: int
    rep: int
    he: int
    ge: int
    ukv: int
    gt: int
    n_outer: int
    n_inner: int

    def q_head(self, o: int, t: int, r: int, j: int, i: int) -> int:
        """Query head of chunk o, stage t of it, device r, its j-th key head and i-th query of that."""
        kv = o * self.ukv + r * (self.ukv // self.cp_size) + j
        return kv * self.ge + t * self.gt + i

    @property
    def order(self) -> np.ndarray:
        """int [num_heads]: query heads in the order of (chunk, stage, device, key head, query)."""
        natural = np.arange(self.num_heads).reshape(
            self.n_outer, self.cp_size, self.ukv // self.cp_size, self.n_inner, self.gt
        )
        return natural.transpose(0, 3, 1, 2, 4).reshape(-1)

    @property
    def inverse(self) -> np.ndarray:
        """int [num_heads]: where in `order` each query head is."""
        return np.argsort(self.order)


def legal_heads_per_stage(num_heads: int, num_kv_heads: int, cp_size: int) -> tuple[int, ...]:
    """Every number of query heads that a stage may have, ascending; the smallest needs least memory.

    ValueError, naming what would work, unless the heads can be shared by `cp_size` devices at all.
    """
    check_heads(num_heads, num_kv_heads, cp_size)
    return tuple(
        u
        for u in range(cp_size, num_heads + 1, cp_size)
        if _split(num_heads, num_kv_heads, cp_size, u)
    )


def head_schedule(
    num_heads: int, num_kv_heads: int, cp_size: int, heads_per_stage: int
) -> HeadSchedule:
    """The schedule of stages of `heads_per_stage` query heads on `cp_size` devices.

    ValueError, naming what would work, for numbers that do not fit.
    """
    legal = legal_heads_per_stage(num_heads, num_kv_heads, cp_size)
    if heads_per_stage not in legal:
        near = sorted(legal, key=lambda u: abs(u - heads_per_stage))[:2]
        raise ValueError(
            f"heads_per_stage={heads_per_stage} is not legal for num_heads={num_heads}, "
            f"num_kv_heads={num_kv_heads}, context={cp_size}: use one of {list(legal)}, "
            f"nearest {sorted(near)}"
        )
    found = _split(num_heads, num_kv_heads, cp_size, heads_per_stage)
    assert found
    ukv, gt = found
    rep = replication(num_kv_heads, cp_size)
    he = num_kv_heads * rep
    ge = num_heads // he
    return HeadSchedule(
        num_heads, num_kv_heads, cp_size, heads_per_stage, rep, he, ge, ukv, gt, he // ukv, ge // gt
    )


def replication(num_kv_heads: int, cp_size: int) -> int:
    """How often a key/value head is repeated so that every device has one."""
    return max(cp_size // num_kv_heads, 1)


def _split(num_heads: int, num_kv_heads: int, cp_size: int, u: int) -> tuple[int, int] | None:
    """(key/value heads of a chunk, query heads each of them has in a stage); None: no such stage."""
    he = num_kv_heads * replication(num_kv_heads, cp_size)
    ge, m = num_heads // he, u // cp_size
    if u < 1 or u % cp_size or num_heads % u:
        return None
    if m <= ge:
        return (cp_size, m) if ge % m == 0 else None
    if m % ge:
        return None
    ukv = cp_size * m // ge
    return (ukv, ge) if he % ukv == 0 else None


def check_heads(num_heads: int, num_kv_heads: int, cp_size: int) -> None:
    """ValueError, naming what would work, unless `cp_size` devices can share these heads."""
    check_groups(num_heads, num_kv_heads)
    if cp_size < 1:
        raise ValueError(f"context={cp_size} must be at least 1")
    legal = [c for c in range(1, num_heads + 1) if shareable(num_heads, num_kv_heads, c)]
    given = f"num_heads={num_heads}, num_kv_heads={num_kv_heads}"
    if num_heads % cp_size:
        raise ValueError(
            f"num_heads={num_heads} is not divisible by context={cp_size}; for {given} use "
            f"context in {legal}"
        )
    if not shareable(num_heads, num_kv_heads, cp_size):
        raise ValueError(
            f"num_kv_heads={num_kv_heads} and context={cp_size}: one must divide the other; for "
            f"{given} use context in {legal}"
        )


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    """ValueError unless every key/value head is read by the same number of query heads."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        legal = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}; "
            f"use num_kv_heads in {legal}"
        )


def shareable(num_heads: int, num_kv_heads: int, c: int) -> bool:
    """Whether `c` devices can share these heads."""
    return num_heads % c == 0 and (num_kv_heads % c == 0 or c % num_kv_heads == 0)
