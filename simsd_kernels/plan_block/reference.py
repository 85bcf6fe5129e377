"""The definition of `plan_block`: plain Python over lists, one lane after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simsd_kernels import rows
from simsd_kernels.sample_logits.reference import sample_logits

MAX_CHILDREN = 64  # continuations of one state that are looked at, the likeliest
COPY_ALIGNMENT = 16


@dataclass
class State:
    """A partial reveal of block number `block` (0: the current one) at denoising step `step`."""

    block: int
    revealed: int
    tokens: tuple[int, ...]  # -1 where masked
    step: int
    reach: float
    cost: int = 1  # in copies: 2 where the finished block before it has to come along
    score: float = field(default=0.0)


def plan_block(
    tokens: Tensor,
    revealed: Tensor,
    start: Tensor,
    step: Tensor,
    blocks_left: Tensor,
    clean: Tensor,
    depth: Tensor,
    prob: Tensor,
    log_odds: Tensor,
    entropy: Tensor,
    trust: Tensor,
    power: Tensor,
    draft_logits: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seed: Tensor | None,
    banned_ids: Tensor | None,
    schedule: Tensor,
    strategy: str,
    threshold: float,
    floor: float,
    mask_id: int,
    max_copies: int,
    max_rows: int,
    scratch: int,
    slots: int,
    stride: int,
) -> tuple[Tensor, ...]:
    """See `api.plan_block`. Reads its arguments on the host."""
    batch, length = tokens.shape
    counts = schedule.tolist()
    if strategy == "low_confidence_dynamic":  # the bar that `reveal` compares float32 probabilities with
        threshold = torch.tensor(threshold, dtype=torch.float32, device="cpu").item()
    graphs: list[list[State]] = []
    for lane in range(batch):
        if int(start[lane]) < 0:
            graphs.append([])
            continue
        draft = _Draft(lane, clean, prob, log_odds, entropy, power, draft_logits, start, length, strategy)
        draft.sampling = (temperature, top_k, top_p, seed, banned_ids)
        bits = int(revealed[lane]) & ((1 << length) - 1)
        known = tuple(int(t) if bits >> i & 1 else -1 for i, t in enumerate(tokens[lane].tolist()))
        root = State(0, bits, known, int(step[lane]), 1.0)
        limits = int(depth[lane]), int(blocks_left[lane]), float(trust[lane])
        graphs.append(_grow(root, draft, *limits, counts, strategy, threshold, floor, max_copies))
    _fit(graphs, max_rows // length if length else 0)
    with torch.device("cpu"):  # whatever torch.set_default_device says
        laid_out = _lay_out(graphs, start, clean, length, mask_id, max_copies, scratch, slots, stride)
    return tuple(x.to(clean.device) for x in laid_out)


@dataclass
class _Draft:
    """What the draft says of one lane's blocks."""

    lane: int
    clean: Tensor
    prob: Tensor
    log_odds: Tensor
    entropy: Tensor
    power: Tensor
    logits: Tensor | None
    start: Tensor
    length: int
    strategy: str
    sampling: tuple[Tensor | None, ...] = ()

    def proposal(self, state: State) -> tuple[list[int], list[float], list[float], list[float]]:
        """token, prob, log_odds and entropy of each position, as the draft would draw them in `state`."""
        at = self.lane, state.block
        if self.logits is None:
            return tuple(x[at].tolist() for x in (self.clean, self.prob, self.log_odds, self.entropy))
        temperature, top_k, top_p, seed, banned = self.sampling
        device, n = self.logits.device, self.length

        def every(value: Tensor | None, default: float, dtype: torch.dtype) -> Tensor:
            return torch.full((n,), default, dtype=dtype, device=device) if value is None else value[at[0]].expand(n)

        first = int(self.start[self.lane]) + state.block * n
        key = 0 if self.strategy == "sequential" else _signed(state.revealed)
        out = sample_logits(
            self.logits[at],
            every(temperature, 0.0, torch.float32),
            every(top_k, 0, torch.int32),
            every(top_p, 1.0, torch.float32),
            every(seed, 0, torch.int64),
            torch.arange(first, first + n, dtype=torch.int32, device=device),
            torch.full((n,), key, dtype=torch.int64, device=device),
            banned,
        )
        return tuple(x.tolist() for x in out[:4])


def _grow(
    root: State,
    draft: _Draft,
    depth: int,
    blocks_left: int,
    trust: float,
    counts: list[int],
    strategy: str,
    threshold: float,
    floor: float,
    max_copies: int,
) -> list[State]:
    """Best-first: the states to copy, the root first, then each time the one that the walk most probably visits."""
    full = (1 << draft.length) - 1
    taken: list[State] = []
    candidates: dict[tuple, State] = {}
    state = root
    while True:
        taken.append(state)
        if len(taken) == max_copies:
            break
        if state.block < depth:
            token, prob, *statistics = draft.proposal(state)
            power = float(draft.power[draft.lane, state.block])
            for chosen, likelihood in continuations(state, prob, *statistics, counts, strategy, threshold, power):
                reach = state.reach * likelihood
                for i in sorted(chosen):
                    reach *= trust * prob[i]
                if not reach > 0:
                    continue
                tokens = tuple(token[i] if i in chosen else t for i, t in enumerate(state.tokens))
                bits = state.revealed | sum(1 << i for i in chosen)
                child = State(state.block, bits, tokens, state.step + 1, reach)
                if bits == full:  # finished: no copy of it, but the next block may follow
                    if list(tokens) != draft.clean[draft.lane, state.block].tolist():
                        continue
                    if state.block + 1 >= blocks_left:
                        continue
                    child = State(state.block + 1, 0, (-1,) * draft.length, 0, reach, cost=2)
                key = child.block, child.revealed, child.tokens
                if any(key == (s.block, s.revealed, s.tokens) for s in taken):
                    continue  # what comes to a state late is not passed on
                if key in candidates:
                    candidates[key].reach += reach
                else:
                    candidates[key] = child
        if not candidates:
            break
        key, best = max(candidates.items(), key=lambda item: item[1].reach / item[1].cost)  # the first of equals
        worth = best.reach / best.cost
        if not worth >= floor or worth == 0:
            break
        # Never above its predecessor's: cutting at any score leaves a graph that the walk can enter.
        best.score = min(taken[-1].score, worth) if len(taken) > 1 else worth
        del candidates[key]
        state = best
    return taken


def continuations(
    state: State,
    prob: list[float],
    log_odds: list[float],
    entropy: list[float],
    counts: list[int],
    strategy: str,
    threshold: float,
    power: float,
) -> list[tuple[frozenset[int], float]]:
    """Sets of positions that the target may reveal next, with probabilities: the draft's own choice, and changes of it
    by one position (one more, one less, one for another), each less likely the more the draft's statistics speak
    against it."""
    masked = [i for i in range(len(prob)) if not state.revealed >> i & 1]
    steps = len(counts)
    if not 0 <= state.step < steps or not masked:
        return []
    count = min(max(counts[state.step], 0), len(masked))
    if state.step == steps - 1:
        return [(frozenset(masked), 1.0)]
    if strategy == "sequential":
        return [(frozenset(masked[:count]), 1.0)] if count else []

    by_entropy = strategy == "entropy_bounded"
    score = [_number(-e if by_entropy else o) for e, o in zip(entropy, log_odds, strict=True)]
    order = sorted(masked, key=lambda i: -score[i])  # stable: ties go to the lowest position
    more: dict[int, float] = {}
    less: dict[int, float] = {}
    size, swaps = count, True
    if by_entropy:
        size, total = 0, 0.0
        for i in order:
            if not total - score[i] < threshold:
                break
            total -= score[i]
            size += 1
        if size < len(order):
            more[order[size]] = _weight(power * (threshold - (total - score[order[size]])))
        if size > 1:
            less[order[size - 1]] = _weight(power * (total - threshold))
        size = max(size, 1)
    elif strategy == "low_confidence_dynamic":
        bar = _logit(threshold)
        confident = sum(prob[i] > threshold for i in masked)
        if confident >= count:
            order.sort(key=lambda i: not prob[i] > threshold)
            size, swaps = confident, confident == count
            more = {i: _weight(power * (score[i] - bar)) for i in order[size:]}
            if size > count:
                less = {i: _weight(power * (bar - score[i])) for i in order[:size]}
    base = frozenset(order[:size])
    weighted = [(base, 1.0)]  # where that is empty the draft would wait, which leads nowhere
    if swaps:
        weighted += [
            (base - {i} | {j}, _weight(power * (score[j] - score[i]))) for i in order[:size] for j in order[size:]
        ]
    weighted += [(base | {j}, w) for j, w in more.items() if j not in base]
    weighted += [(base - {i}, w) for i, w in less.items() if len(base) > 1]
    total = 0.0
    for _, w in weighted:
        total += w
    likeliest = sorted(weighted, key=lambda pair: -pair[1])[:MAX_CHILDREN]
    return [(chosen, w / total) for chosen, w in likeliest if chosen]


def _fit(graphs: list[list[State]], copies: int) -> None:
    """Cuts the graphs, in place, to the best-scored `copies` (roots aside) of the whole batch."""
    ranked = [(-s.score, lane, n, s.cost) for lane, graph in enumerate(graphs) for n, s in enumerate(graph) if n]
    kept, room = [1] * len(graphs), copies
    for _, lane, n, cost in sorted(ranked):
        if cost > room:
            break
        room -= cost
        kept[lane] = n + 1
    for lane, graph in enumerate(graphs):
        del graph[kept[lane] :]


def _lay_out(
    graphs: list[list[State]],
    start: Tensor,
    clean: Tensor,
    length: int,
    mask_id: int,
    max_copies: int,
    scratch: int,
    slots: int,
    stride: int,
) -> tuple[Tensor, ...]:
    """The graphs as rows (on the CPU): finished blocks as drafted, then copies; dead rows where a lane has fewer."""
    batch, ahead = clean.shape[:2]
    shape = (batch, ahead + max_copies, length)
    token = torch.zeros(shape, dtype=torch.int64)
    position, clock, born, dies = (torch.zeros(shape, dtype=torch.int32) for _ in range(4))
    slot = torch.full(shape, -1, dtype=torch.int32)
    clock.fill_(-1)
    states = torch.zeros((batch, max_copies, length), dtype=torch.int64)
    sets = torch.zeros((batch, max_copies), dtype=torch.int64)
    block = torch.full((batch, max_copies), -1, dtype=torch.int32)
    reach = torch.zeros((batch, max_copies), dtype=torch.float32)
    cleaned = torch.zeros(batch, dtype=torch.int32)
    birth = torch.full((batch, slots), rows.INF, dtype=torch.int32)
    death = torch.full((batch, slots), rows.INF, dtype=torch.int32)
    index = torch.arange(length, dtype=torch.int32)
    room = copy_stride(length)

    for lane, graph in enumerate(graphs):
        if not graph:
            continue
        first = int(start[lane])
        number = torch.tensor(first // length)
        committed = torch.arange(first, dtype=torch.int32)
        birth[lane, :first] = committed // length * stride
        for n, state in enumerate(graph):
            seen = [mask_id if t < 0 else t for t in state.tokens]
            at = lane, ahead + n
            token[at] = torch.tensor(seen)
            position[at] = first + state.block * length + index
            slot[at] = scratch + n * room + index
            clock[at], born[at], dies[at] = rows.copy_rows(n, number + state.block, stride)
            states[lane, n], sets[lane, n] = torch.tensor([max(t, 0) for t in state.tokens]), _signed(state.revealed)
            block[lane, n], reach[lane, n] = state.block, state.reach
            if state.cost == 2:
                before = lane, state.block - 1
                token[before] = clean[before].cpu()
                position[before] = slot[before] = first + (state.block - 1) * length + index
                finished = rows.copy_rows(max_copies, number + state.block - 1, stride, clean=True)
                clock[before], born[before], dies[before] = finished
                cleaned[lane] = max(int(cleaned[lane]), state.block)
    live = slot >= 0
    lane = torch.arange(batch)[:, None, None].expand(shape)[live]
    birth[lane, slot[live].long()], death[lane, slot[live].long()] = born[live], dies[live]
    flat = (x.flatten(1) for x in (token, position, slot, clock))
    return (*flat, birth, death, states, sets, block, cleaned, reach)


def copy_stride(length: int) -> int:
    """Slots between the starts of two copies: a power of two, so that no copy straddles a power-of-two tile."""
    return max(COPY_ALIGNMENT, 1 << (length - 1).bit_length()) if length else COPY_ALIGNMENT


def _weight(exponent: float) -> float:
    """At most 1: nothing is likelier than what the draft would do. NaN (infinity times a power of 0) objects not."""
    return math.exp(exponent) if exponent < 0 else 1.0


def _number(value: float) -> float:
    """Finite, so that differences are numbers; NaN ranks last."""
    return -1e30 if math.isnan(value) else min(max(value, -1e30), 1e30)


def _logit(p: float) -> float:
    if p <= 0 or p >= 1:
        return -1e30 if p <= 0 else 1e30
    return math.log(p / (1 - p))


def _signed(bits: int) -> int:
    """A 64-bit set as the int64 that stores it."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits
