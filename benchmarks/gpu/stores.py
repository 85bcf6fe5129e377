"""store_kv, and QK-norm, rotary embedding and store in one call, beside the same by torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import simsd_kernels

from ..contest import Bench, Contestant, contest, near

Q_HEADS, KV_HEADS, DIM, CAPACITY = 32, 8, 128, 4096  # SDAR-8B's heads


def run(bench: Bench) -> None:
    sizes = [(1, 4), (2, 8)] if bench.tiny else [(batch, rows) for batch in (1, 8) for rows in (4, 16, 64, 128, 256)]
    for batch, rows in sizes:
        case = f"store_kv, batch {batch}, {rows} rows"
        bench.attempt(case, lambda c=case, b=batch, n=rows: store(bench, c, b, n))
    for batch, rows in sizes:
        case = f"qk_norm_rope_store, batch {batch}, {rows} rows"
        bench.attempt(case, lambda c=case, b=batch, n=rows: norm_rope_store(bench, c, b, n))
    bench.note("bytes: every input and output once, of the caches what is written")


def caches_of(bench: Bench, batch: int, capacity: int) -> list[Tensor]:
    """K and V [B, Hkv, C, D] as BlockCache lies in memory: a head's slots of all sequences side by side."""
    shape = (KV_HEADS, batch, capacity, DIM)
    made = (torch.zeros(shape, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    return [cache.transpose(0, 1) for cache in made]


def slots_of(bench: Bench, batch: int, rows: int, capacity: int) -> Tensor:
    return torch.stack([bench.permutation(capacity)[:rows] for _ in range(batch)]).int()


def index_copy(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """store_kv by torch."""
    batch, _, capacity, _ = k_cache.shape
    places = (slots + capacity * torch.arange(batch, device=slots.device)[:, None]).flatten().long()
    for new, cache in ((k, k_cache), (v, v_cache)):
        flat = cache.transpose(0, 1).flatten(1, 2)  # [Hkv, B * C, D], a view
        flat.index_copy_(1, places, new.transpose(0, 1).flatten(1, 2))


def same_caches(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str | None:
    """Old contents are NaN, so what was not to be written must be NaN still."""
    for name, cache, wanted in zip(("k_cache", "v_cache"), found, expected, strict=True):
        same = torch.isclose(cache.float(), wanted.float(), rtol=2e-2, atol=2e-2, equal_nan=True)
        if not bool(same.all()):
            return f"{name} differs in {int((~same).sum())} of {same.numel()}"
    return None


def store(bench: Bench, case: str, batch: int, rows: int) -> None:
    capacity = 2 * rows if bench.tiny else CAPACITY
    moved = 2 * (2 * batch * KV_HEADS * rows * DIM * 2) + 4 * batch * rows
    sets = []
    for _ in range(min(32, bench.sets(moved))):  # each has caches of its own
        new = [
            bench.random(batch, rows, KV_HEADS, DIM).transpose(1, 2) for _ in range(2)
        ]  # as a projection leaves them
        sets.append((*new, *caches_of(bench, batch, capacity), slots_of(bench, batch, rows, capacity)))

    def expected() -> tuple[Tensor, Tensor]:
        k, v, k_cache, v_cache, slots = sets[0]
        wanted = [torch.full_like(cache, torch.nan) for cache in (k_cache, v_cache)]
        for b in range(batch):
            for new, cache in zip((k, v), wanted, strict=True):
                cache[b, :, slots[b].long()] = new[b]
        return tuple(wanted)

    def make(write) -> list:
        for _, _, k_cache, v_cache, _ in sets:
            k_cache.fill_(torch.nan)
            v_cache.fill_(torch.nan)

        def call(given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            write(*given)
            return given[2], given[3]

        return [lambda given=given: call(given) for given in sets]

    def by(backend: str):
        return lambda *given: simsd_kernels.store_kv(*given, backend=backend)

    def check(out: tuple[Tensor, Tensor]) -> str | None:
        return same_caches(out, expected())

    contestants = [Contestant(f"simsd {b}", lambda b=b: make(by(b)), check) for b in bench.backends]
    contestants.append(Contestant("torch index_copy_", lambda: make(index_copy), check))
    contest(bench, case, contestants, bytes_moved=moved, input_sets=len(sets))


def norm_rope_store(bench: Bench, case: str, batch: int, rows: int) -> None:
    capacity = 2 * rows if bench.tiny else CAPACITY
    heads = Q_HEADS + 2 * KV_HEADS
    moved = 2 * 2 * batch * rows * heads * DIM + 2 * 2 * batch * rows * DIM + 4 * batch * rows
    weights = [1 + bench.random(DIM, scale=0.1) for _ in range(2)]
    sets = []
    for _ in range(min(32, bench.sets(moved))):
        fused = bench.random(batch, rows, heads, DIM)  # views of one projection's output
        qkv = fused.split([Q_HEADS, KV_HEADS, KV_HEADS], dim=2)
        angle = (6.28 * bench.uniform(batch, rows, DIM // 2)).repeat(1, 1, 2)
        turn = [f(angle).to(fused.dtype) for f in (torch.cos, torch.sin)]
        sets.append((*qkv, *weights, *turn, *caches_of(bench, batch, capacity), slots_of(bench, batch, rows, capacity)))

    def make(function) -> list:
        for given in sets:
            for cache in given[7:9]:
                cache.fill_(torch.nan)
        return [lambda given=given: (function(*given), *given[7:9]) for given in sets]

    def by(backend: str):
        return lambda *given: simsd_kernels.qk_norm_rope_store(*given, backend=backend)

    @functools.cache
    def expected() -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in make(by("reference"))[0]())

    expected()

    def check(out: tuple[Tensor, ...]) -> str | None:
        return near(expected()[0].float(), 1e-2, 5e-2)(out[0]) or same_caches(out[1:], expected()[1:])

    contestants = [Contestant(f"simsd {b}", lambda b=b: make(by(b)), check) for b in bench.backends]
    contestants.append(Contestant("torch eager", lambda: make(by_torch), check))
    contest(
        bench, case, contestants, bytes_moved=moved, output_bytes=2 * batch * rows * Q_HEADS * DIM, input_sets=len(sets)
    )


def by_torch(q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, slots) -> Tensor:
    """As transformers' Qwen3Attention has it, then the store."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]

    q, k = (turned(norm(x, weight).transpose(1, 2)) for x, weight in ((q, q_weight), (k, k_weight)))
    index_copy(k, v.transpose(1, 2), k_cache, v_cache, slots)
    return q
